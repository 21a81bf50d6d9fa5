//! Commands that wait, by project. Pure.

use std::collections::{HashMap, VecDeque};

use contract::{
    ObjectId,
    pack::{PackBudget, PackedCommand},
};

/// Commands that wait: in order within a project. Projects take turns, so that none fills a pack while others wait.
#[derive(Debug)]
pub(super) struct PackQueue<T> {
    projects: HashMap<ObjectId, VecDeque<T>>,
    /// The projects with waiting commands. The first one is next.
    turns: VecDeque<ObjectId>,
}

impl<T> Default for PackQueue<T> {
    fn default() -> Self {
        Self { projects: HashMap::new(), turns: VecDeque::new() }
    }
}

impl<T: AsRef<PackedCommand>> PackQueue<T> {
    pub(super) fn push(&mut self, project_id: ObjectId, command: T) {
        let waiting = self.projects.entry(project_id).or_default();
        if waiting.is_empty() {
            self.turns.push_back(project_id);
        }
        waiting.push_back(command);
    }

    /// Takes the commands of a pack of at most `max_bytes`, one command of each project in turn; or one command that is
    /// too large for a pack. A project whose next command does not fit comes first in the next pack.
    pub(super) fn take_pack(&mut self, max_bytes: usize) -> Vec<T> {
        let mut budget = PackBudget::new(max_bytes);
        let mut pack = Vec::new();
        let mut left_out = VecDeque::new();
        while !budget.is_full()
            && let Some(project_id) = self.turns.pop_front()
        {
            let Some(waiting) = self.projects.get_mut(&project_id) else { continue };
            let fits = waiting.front().is_some_and(|command| budget.try_add(command.as_ref()));
            if !fits && !pack.is_empty() {
                left_out.push_back(project_id);
                continue;
            }
            pack.extend(waiting.pop_front());
            if waiting.is_empty() {
                self.projects.remove(&project_id);
            } else {
                self.turns.push_back(project_id);
            }
            if !fits {
                break;
            }
        }
        left_out.append(&mut self.turns);
        self.turns = left_out;
        pack
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use contract::pack::{self, MAX_PACK_COMMANDS};
    use proptest::prelude::*;

    use super::*;

    struct Numbered(u8, usize, PackedCommand);

    impl AsRef<PackedCommand> for Numbered {
        fn as_ref(&self) -> &PackedCommand {
            &self.2
        }
    }

    impl PackQueue<Numbered> {
        /// Queues a command of this project, with this number and size.
        fn add(&mut self, project: u8, number: usize, bytes: usize) {
            let payload = "x".repeat(bytes).into();
            let command = PackedCommand { subject: "s".into(), traceparent: None, payload };
            self.push(ObjectId::from_bytes([project; 12]), Numbered(project, number, command));
        }

        /// The projects and numbers of the next pack.
        fn take(&mut self, max_bytes: usize) -> Vec<(u8, usize)> {
            self.take_pack(max_bytes).iter().map(|Numbered(project, number, _)| (*project, *number)).collect()
        }
    }

    const LARGE: usize = 1 << 20;

    #[test]
    fn projects_take_turns_in_a_pack_and_from_one_pack_to_the_next() {
        let mut queue = PackQueue::default();
        for number in 0..2 * MAX_PACK_COMMANDS {
            queue.add(1, number, 1);
        }
        queue.add(2, 0, 1);
        queue.add(2, 1, 1);
        queue.add(3, 0, 1);

        let pack = queue.take(LARGE);
        assert_eq!(pack[..6], [(1, 0), (2, 0), (3, 0), (1, 1), (2, 1), (1, 2)]);
        assert_eq!(pack.len(), MAX_PACK_COMMANDS);

        queue.add(2, 2, 1);
        assert_eq!(queue.take(LARGE)[..3], [(1, 997), (2, 2), (1, 998)]);
        assert_eq!(queue.take(LARGE).len(), 2 * MAX_PACK_COMMANDS + 4 - 2 * MAX_PACK_COMMANDS);
        assert_eq!(queue.take(LARGE), []);
        assert!(queue.projects.is_empty() && queue.turns.is_empty());
    }

    #[test]
    fn a_command_that_does_not_fit_begins_the_next_pack_and_one_that_never_fits_goes_alone() {
        let mut queue = PackQueue::default();
        queue.add(1, 0, 100);
        queue.add(2, 0, 800);
        queue.add(2, 1, 1);
        queue.add(3, 0, 100);
        queue.add(1, 1, 9000);
        queue.add(1, 2, 100);

        assert_eq!(queue.take(1000), [(1, 0), (3, 0)]);
        assert_eq!(queue.take(1000), [(2, 0), (2, 1)]);
        assert_eq!(queue.take(1000), [(1, 1)]);
        assert_eq!(queue.take(1000), [(1, 2)]);
        assert_eq!(queue.take(1000), []);
    }

    proptest! {
        #[test]
        fn every_command_is_taken_once_in_its_projects_order_and_no_pack_is_too_large(
            sizes in prop::collection::vec((0_u8..5, 0..700_usize), 1..200), max_bytes in 100..2000_usize,
        ) {
            let mut queue = PackQueue::default();
            let mut expected: HashMap<u8, Vec<usize>> = HashMap::new();
            for (number, (project, bytes)) in sizes.iter().enumerate() {
                queue.add(*project, number, *bytes);
                expected.entry(*project).or_default().push(number);
            }
            let mut taken: HashMap<u8, Vec<usize>> = HashMap::new();
            loop {
                let waiting = queue.turns.len();
                let pack = queue.take_pack(max_bytes);
                if pack.is_empty() {
                    break;
                }
                let bytes = pack::write(pack.iter().map(AsRef::as_ref)).unwrap().len();
                prop_assert!(pack.len() == 1 || bytes <= max_bytes, "{} commands of {bytes} bytes", pack.len());
                // With commands of one size, no project takes a second turn before each has taken its first.
                let projects: HashSet<u8> = pack.iter().map(|command| command.0).collect();
                if sizes.iter().all(|(_, bytes)| *bytes == sizes[0].1) {
                    prop_assert!(projects.len() == pack.len().min(waiting), "{projects:?} of {waiting}");
                }
                for Numbered(project, number, _) in pack {
                    taken.entry(project).or_default().push(number);
                }
            }
            prop_assert_eq!(taken, expected);
        }
    }
}
