//! Random histories: the outcomes of a log equal those of the reference model, message by message and lead by lead.

use std::{collections::HashSet, sync::Arc};

use async_nats::{HeaderMap, jetstream::consumer::pull};
use bytes::Bytes;
use contract::{
    JsonObject, ObjectId, Timestamp,
    pack::{self, PackedCommand},
    position::LogPosition,
    process::Rules,
    streams::LEAD_COMMANDS,
    subject::PACKS,
};
use futures::StreamExt;
use lead_state::core::{
    batch::{BatchState, LeadKeys, UpdateKey, decide_batch},
    decide::{Lead, Limits},
    entry::{LogMessage, parse},
};
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use serde_json::{Value, json, value::RawValue};

use crate::support::{
    Stack, TEST_TIMEOUT,
    history::{Leads, differences, message_or_erasure, new_lead, prepare, processes},
    model::{Model, Place},
    publish_in_order,
};

/// Decides messages in random batches, and stores the state as the database does. Returns the dead letters and the
/// outcomes.
fn decide_all(
    state: &mut BatchState,
    messages: &[LogMessage],
    random: &mut StdRng,
) -> (Vec<Place>, Vec<(String, Option<String>)>) {
    let mut dead = Vec::new();
    let place = |at: LogPosition| (at.sequence, at.index);
    let mut outcomes = Vec::new();
    let mut rest = messages;
    while !rest.is_empty() {
        let (batch, later) = rest.split_at(random.random_range(1..=rest.len()));
        rest = later;
        let (entries, unreadable): (Vec<_>, Vec<_>) =
            batch.iter().map(|message| parse(message, 1)).partition(Result::is_ok);
        let entries: Vec<_> = entries.into_iter().flatten().collect();
        dead.extend(unreadable.into_iter().filter_map(Result::err).map(|dead| place(dead.position)));
        let read = read_state(state, &LeadKeys::of(&entries));
        let plan = decide_batch(read, entries, Timestamp::from_millis(0), Limits { metadata_bytes: 1 << 20 });
        dead.extend(plan.dead_letters.iter().map(|dead| place(dead.position)));
        for erasure in &plan.erasures {
            state.references.retain(|_, lead_id| *lead_id != erasure.lead_id);
        }
        state.leads.extend(plan.leads.into_iter().map(|lead| (lead.lead_id, lead)));
        state.calls.extend(plan.calls);
        for queue in state.queued.values_mut() {
            queue.retain(|queued| !plan.released.contains(&queued.update.key()));
        }
        for queued in plan.newly_queued {
            state.queued.entry(queued.lead_id).or_default().push(queued);
        }
        for queue in state.queued.values_mut() {
            queue.sort_by_key(|queued| queued.update.position);
        }
        // The cache must contain the same queued updates as the database.
        for (lead_id, queue) in plan.queued {
            assert_eq!(state.queued.get(&lead_id).cloned().unwrap_or_default(), queue);
        }
        for (lead_id, queue) in &state.queued {
            assert!(
                queue.is_empty() || !state.calls[lead_id].is_empty(),
                "{lead_id} has queued updates without a call"
            );
        }
        assert!(plan.rows.is_sorted_by_key(|row| (row.decided_at, row.position)), "decided in log order");
        for row in plan.rows {
            state.recorded.insert(row.key());
            outcomes.push((row.event.update_id.to_string(), row.event.error));
        }
    }
    (dead, outcomes)
}

/// The part of the state that a read of these keys returns.
fn read_state(state: &BatchState, keys: &LeadKeys) -> BatchState {
    let referenced: Vec<_> = keys.references.iter().filter_map(|key| state.references.get(key)).collect();
    let is_read = |id: &ObjectId| keys.leads.contains(id) || referenced.contains(&id);
    let queued: Vec<UpdateKey> = state.queued.values().flatten().map(|queued| queued.update.key()).collect();
    let is_recorded = |key: &&UpdateKey| state.recorded.contains(*key) || queued.contains(key);
    BatchState {
        leads: state.leads.iter().filter(|(id, _)| is_read(id)).map(|(id, lead)| (*id, lead.clone())).collect(),
        references: state.references.clone(),
        calls: state.calls.iter().filter(|(id, _)| is_read(id)).map(|(id, calls)| (*id, calls.clone())).collect(),
        rules: state.rules.clone(),
        recorded: keys.updates.iter().filter(is_recorded).copied().collect(),
        queued: state.queued.iter().filter(|(id, _)| is_read(id)).map(|(id, queue)| (*id, queue.clone())).collect(),
    }
}

/// Two processes with two leads each, in the model and in the state that decisions read.
fn two_processes(project_id: ObjectId) -> (Model, BatchState, Vec<Leads>) {
    let mut model = Model::default();
    let mut state = BatchState::default();
    let mut all = Vec::new();
    for (number, spec) in processes(&json!([])).into_iter().enumerate() {
        let process_id = ObjectId::from_bytes([number as u8 + 3; 12]);
        let mut leads = Leads { project_id, process_id, leads: Vec::new() };
        let rules: Rules = serde_json::from_value(spec.clone()).expect("rules");
        state.rules.insert(process_id, Arc::new(rules));
        model.processes.insert(process_id.to_string(), spec);
        for number in 0..2_u8 {
            let lead_id = ObjectId::from_bytes([process_id.as_bytes()[0] * 16 + number; 12]);
            let reference = format!("R-{number}");
            let lead = new_lead(&leads, &reference);
            state.references.insert((process_id, reference.clone()), lead_id);
            let known = Lead {
                lead_id,
                project_id,
                process_id,
                reference_id: Some(reference.clone()),
                name: lead.name.clone(),
                state: lead.state.clone(),
                disposition: None,
                metadata: JsonObject::from_text(lead.metadata.to_string()).expect("metadata"),
                version: 1,
                is_erased: false,
            };
            state.leads.insert(lead_id, Arc::new(known));
            model.leads.insert(lead_id.to_string(), lead);
            leads.leads.push((lead_id.to_string(), reference));
        }
        all.push(leads);
    }
    (model, state, all)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Decisions on batches of any size equal those of the model, which decides one message after the other.
    #[test]
    fn batches_decide_like_the_model(seed: u64, length in 1_usize..120) {
        let mut random = StdRng::seed_from_u64(seed);
        let project_id = ObjectId::from_bytes([2; 12]);
        let (mut model, mut state, all) = two_processes(project_id);
        let mut messages: Vec<LogMessage> = Vec::new();
        for number in 0..length {
            let logged_at = Timestamp::from_millis(1_768_193_759_000 + number as i64 * 400);
            let sequence = number as u64 + 1;
            let again = messages.choose(&mut random).filter(|_| number % 9 == 8);
            let (subject, payload) = match again {
                Some(earlier) => (earlier.subject.clone(), earlier.payload.clone()),
                None => {
                    let leads = all.choose(&mut random).expect("leads").clone();
                    message_or_erasure(&leads, logged_at, &mut random)
                }
            };
            model.feed(sequence, logged_at, &subject, &payload);
            messages.push(LogMessage::alone(sequence, logged_at, subject, None, payload));
        }
        let (dead, outcomes) = decide_all(&mut state, &messages, &mut random);
        prop_assert_eq!(dead.into_iter().collect::<HashSet<_>>(), model.dead_letters);
        prop_assert_eq!(outcomes.len(), model.outcomes.len());
        for (update_id, error) in outcomes {
            let key = (project_id.to_string(), update_id);
            prop_assert_eq!(&error, &model.outcomes[&key].error, "{:?}", key);
        }
        let mut queued: Vec<_> = state.queued.values().flatten().map(|queued| queued.update.update_id.to_string()).collect();
        let mut expected: Vec<_> = model.queued.values().flatten().map(|queued| queued.key.1.clone()).collect();
        queued.sort();
        expected.sort();
        prop_assert_eq!(queued, expected);
        for (lead_id, lead) in &state.leads {
            let expected = &model.leads[&lead_id.to_string()];
            let metadata: Value = serde_json::from_str(lead.metadata.get()).expect("metadata");
            prop_assert_eq!(&metadata, &expected.metadata);
            prop_assert_eq!(
                (&lead.name, &lead.state, &lead.disposition, lead.version),
                (&expected.name, &expected.state, &expected.disposition, expected.version)
            );
        }
    }
}

#[tokio::test]
async fn a_random_history_leaves_the_database_equal_to_the_model() {
    let stack = Stack::start().await;
    let mut random = StdRng::seed_from_u64(7);
    let mut model = Model::default();
    let mut all = Vec::new();
    for spec in processes(&json!([])) {
        all.push(prepare(&stack.api, &stack.client, spec, 4, &mut model).await);
    }
    let mut sent: Vec<(String, Bytes)> = Vec::new();
    for number in 0..3000 {
        let again = sent.choose(&mut random).filter(|_| number % 20 == 19).cloned();
        let leads = all.choose(&mut random).expect("leads");
        let (subject, payload) =
            again.unwrap_or_else(|| message_or_erasure(leads, service_kit::clock::now(), &mut random));
        sent.push((subject, payload));
    }
    let messages = packed(sent, &mut random).into_iter().map(|(subject, payload)| (subject, HeaderMap::new(), payload));
    publish_in_order(&stack.js(), 256, messages).await;
    stack.wait_until_applied().await;
    // The last calls expire, and the updates queued behind them are decided.
    stack.wait_for_count("SELECT count(*) FROM lead_state.queued_updates", 0).await;
    let last = stack.wait_until_applied().await;
    let decided_later = "SELECT count(*) FROM lead_state.lead_updates WHERE decided_sequence IS NOT NULL";
    assert!(stack.count(decided_later).await > 10, "the history has too few special cases");
    stack.wait_for_count("SELECT count(*) FROM lead_state.pending_erasures", 0).await;
    feed_log(&stack, &mut model, last).await;
    let differences = differences(&stack.pool, &model).await;
    assert!(differences.is_empty(), "{} differences, the first: {}", differences.len(), differences[0]);
    let dead = stack.dead_letters().await;
    assert_eq!(dead, model.dead_letters.len() as u64, "dead letters");
    let special = model.repeated > 0 && dead > 0 && !model.erased.is_empty();
    assert!(special, "the history has too few special cases");
}

/// Combines some of the commands into packs. A pack can contain only JSON.
fn packed(sent: Vec<(String, Bytes)>, random: &mut StdRng) -> Vec<(String, Bytes)> {
    let is_json = |payload: &Bytes| serde_json::from_slice::<&RawValue>(payload).is_ok();
    let mut sent = sent.into_iter().peekable();
    let mut messages = Vec::new();
    while sent.peek().is_some() {
        let most = *[1, 1, 7, 40].choose(random).expect("a number");
        let mut commands = Vec::new();
        while commands.len() < most
            && let Some((subject, payload)) = sent.next_if(|(_, payload)| is_json(payload))
        {
            // A payload in a pack has no white space around it.
            let payload = payload.slice_ref(payload.trim_ascii());
            commands.push(PackedCommand { subject, traceparent: None, payload });
        }
        match commands.len() {
            0 => messages.extend(sent.next()),
            1 => messages.extend(commands.into_iter().map(|command| (command.subject, command.payload))),
            _ => messages.push((PACKS.to_owned(), pack::write(&commands).expect("a pack"))),
        }
    }
    messages
}

/// Reads the log up to `last` into the model.
async fn feed_log(stack: &Stack, model: &mut Model, last: u64) {
    let stream = stack.js().get_stream(LEAD_COMMANDS).await.expect("the log");
    let consumer = stream.create_consumer(pull::OrderedConfig::default()).await.expect("a consumer");
    let mut messages = consumer.messages().await.expect("messages");
    for sequence in 1..=last {
        let message = tokio::time::timeout(TEST_TIMEOUT, messages.next()).await.expect("in time");
        let message = message.expect("more").expect("a message");
        let info = message.info().expect("its position");
        assert_eq!(info.stream_sequence, sequence, "the log has a gap");
        model.feed(info.stream_sequence, info.published.into(), &message.subject, &message.payload);
    }
}
