//! The states of a process as a graph, drawn as SVG.

use std::collections::{BTreeMap, VecDeque};

use contract::process::{Rules, State, StateKind};
use maud::{Markup, html};

/// A process with more states is shown as a table only: a larger graph could not be read.
const MAX_DRAWN: usize = 40;

const NODE: (usize, usize) = (150, 36);
const GAP: (usize, usize) = (70, 24);
const MARGIN: usize = 30;
/// The longest name that fits into a node.
const MAX_LABEL: usize = 18;

/// The states and transitions of a process; with a lead's state, where the lead is and where it may move to.
pub(crate) fn states(rules: &Rules, current: Option<&str>) -> Markup {
    html! {
        @if !rules.states.is_empty() && rules.states.len() <= MAX_DRAWN { (drawing(rules, current)) }
        @match current {
            None if rules.transitions.is_some() => "",
            None if rules.states.iter().any(|state| is_closed(rules, state)) => p {
                "Any transition is allowed, except out of a terminal state."
            },
            None => p { "Any transition is allowed." },
            Some(state) => p {
                @let targets = targets(rules, state);
                "The lead is in " b { (state) } ". "
                @if targets.is_empty() { "It may move to no other state." }
                @else if rules.transitions.is_none() { "Any transition is allowed." }
                @else { "It may move to " (targets.join(", ")) "." }
            },
        }
        details {
            summary { "States as a table" }
            table {
                thead { tr { th scope="col" { "State" } th scope="col" { "Kind" } th scope="col" { "May move to" } } }
                tbody {
                    @for state in &rules.states {
                        tr {
                            td { (state.name) }
                            td { (kind(state.kind)) }
                            td { (described_targets(rules, state)) }
                        }
                    }
                }
            }
        }
    }
}

/// The other states that a lead may move to. lead-state decides the same.
pub(crate) fn targets<'a>(rules: &'a Rules, from: &str) -> Vec<&'a str> {
    if rules.state(from).is_some_and(|state| is_closed(rules, state)) {
        return vec![];
    }
    let is_listed = |to: &str| {
        rules.transitions.as_ref().is_none_or(|all| all.get(from).is_some_and(|targets| targets.contains(to)))
    };
    rules.states.iter().map(|state| state.name.as_str()).filter(|to| *to != from && is_listed(to)).collect()
}

/// Whether no lead may leave a state.
fn is_closed(rules: &Rules, state: &State) -> bool {
    state.kind == StateKind::Terminal && !rules.allow_leaving_terminal
}

fn kind(kind: StateKind) -> &'static str {
    match kind {
        StateKind::Initial => "initial",
        StateKind::Active => "active",
        StateKind::Terminal => "terminal",
    }
}

fn described_targets(rules: &Rules, state: &State) -> String {
    if rules.transitions.is_none() && !is_closed(rules, state) {
        return "any state".into();
    }
    targets(rules, &state.name).join(", ")
}

/// Where a state is drawn: its column and row.
type Place = (usize, usize);

/// Each state's column is its distance from the initial state; states that cannot be reached stand in the last column.
fn places<'a>(rules: &'a Rules) -> BTreeMap<&'a str, Place> {
    if rules.transitions.is_none() {
        // Without transitions there is no distance: rows of four.
        return rules.states.iter().enumerate().map(|(n, state)| (state.name.as_str(), (n % 4, n / 4))).collect();
    }
    let mut columns = BTreeMap::new();
    let mut queue: VecDeque<_> = rules.initial_state().map(|state| (state.name.as_str(), 0)).into_iter().collect();
    while let Some((state, column)) = queue.pop_front() {
        if columns.contains_key(state) {
            continue;
        }
        columns.insert(state, column);
        queue.extend(targets(rules, state).into_iter().map(|target| (target, column + 1)));
    }
    let last = columns.values().max().map_or(0, |column| column + 1);
    let mut rows = BTreeMap::new();
    let place = |state: &'a State| {
        let column = columns.get(state.name.as_str()).copied().unwrap_or(last);
        let row = rows.entry(column).or_default();
        let place = (column, *row);
        *row += 1;
        (state.name.as_str(), place)
    };
    rules.states.iter().map(place).collect()
}

fn drawing(rules: &Rules, current: Option<&str>) -> Markup {
    let places = places(rules);
    let size = |(count, node, gap): (usize, usize, usize)| count * node + count.saturating_sub(1) * gap + 2 * MARGIN;
    let columns = places.values().map(|(column, _)| column + 1).max().unwrap_or(1);
    let rows = places.values().map(|(_, row)| row + 1).max().unwrap_or(1);
    let (width, height) = (size((columns, NODE.0, GAP.0)), size((rows, NODE.1, GAP.1)));
    let allowed = current.map(|current| targets(rules, current)).unwrap_or_default();
    html! {
        div.scroll tabindex="0" role="region" aria-label="States as a graph" {
            svg.graph viewBox={ "0 0 " (width) " " (height) } width=(width) height=(height) role="img" aria-labelledby="graph-title graph-text" {
                title #graph-title { "States and transitions" }
                desc #graph-text { "The table of states below has the same content." }
                defs {
                    marker #arrow viewBox="0 0 8 8" refX="8" refY="4" markerUnits="userSpaceOnUse" markerWidth="8" markerHeight="8" orient="auto" {
                        path d="M0,0 L8,4 L0,8 z" {}
                    }
                }
                @for from in rules.transitions.iter().flat_map(|all| all.keys()) {
                    // A transition from a state to itself is not drawn: its arc would only cross the others.
                    @for to in targets(rules, from) {
                        @if let (Some(from_place), Some(to_place)) = (places.get(from.as_str()), places.get(to)) {
                            path class=(if current == Some(from) { "edge open" } else { "edge" })
                                d=(edge(*from_place, *to_place)) marker-end="url(#arrow)" {}
                        }
                    }
                }
                @for state in &rules.states {
                    @if let Some(place) = places.get(state.name.as_str()) {
                        @let (x, y) = corner(*place);
                        @let is_allowed = allowed.contains(&state.name.as_str());
                        g class=(node_class(state.kind, current == Some(state.name.as_str()), is_allowed)) {
                            rect x=(x) y=(y) width=(NODE.0) height=(NODE.1) rx="8" {}
                            text x=(x + NODE.0 / 2) y=(y + NODE.1 / 2 + 4) text-anchor="middle" { (label(&state.name)) }
                        }
                    }
                }
            }
        }
    }
}

fn node_class(kind: StateKind, is_current: bool, is_allowed: bool) -> String {
    let role = match (is_current, is_allowed) {
        (true, _) => " current",
        (_, true) => " open",
        _ => "",
    };
    format!("node {}{role}", self::kind(kind))
}

fn label(name: &str) -> String {
    if name.chars().count() <= MAX_LABEL {
        return name.to_owned();
    }
    name.chars().take(MAX_LABEL - 1).chain(['…']).collect()
}

/// The upper left corner of a node.
fn corner((column, row): Place) -> (usize, usize) {
    (MARGIN + column * (NODE.0 + GAP.0), MARGIN + row * (NODE.1 + GAP.1))
}

/// The path of a transition: to the right from side to side, within a column from edge to edge, to the left in an arc
/// above the nodes.
fn edge(from: Place, to: Place) -> String {
    let ((x1, y1), (x2, y2)) = (corner(from), corner(to));
    if to.0 > from.0 {
        let (x1, y1, y2) = (x1 + NODE.0, y1 + NODE.1 / 2, y2 + NODE.1 / 2);
        let middle = x1.midpoint(x2);
        return format!("M{x1},{y1} C{middle},{y1} {middle},{y2} {x2},{y2}");
    }
    if to.0 == from.0 {
        let x = x1 + NODE.0 / 2 + if to.1 > from.1 { NODE.0 / 8 } else { 0 };
        let (y1, y2) = if to.1 > from.1 { (y1 + NODE.1, y2) } else { (y1, y2 + NODE.1) };
        return format!("M{x},{y1} L{x},{y2}");
    }
    let (x1, x2) = (x1 + NODE.0 * 2 / 3, x2 + NODE.0 / 3);
    let top = y1.min(y2).saturating_sub(MARGIN);
    format!("M{x1},{y1} C{x1},{top} {x2},{top} {x2},{y2}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(transitions: Option<&[(&str, &[&str])]>) -> Rules {
        let state = |name: &str, kind| State { name: name.into(), kind, takes_disposition: None };
        let transitions = transitions.map(|rows| {
            let set = |targets: &[&str]| targets.iter().map(|target| (*target).to_owned()).collect();
            rows.iter().map(|(from, targets)| ((*from).to_owned(), set(targets))).collect()
        });
        let states = vec![
            state("new", StateKind::Initial),
            state("contacted", StateKind::Active),
            state("a <name> that is too long", StateKind::Active),
            state("lost", StateKind::Terminal),
        ];
        Rules { states, transitions, ..Rules::default() }
    }

    #[test]
    fn a_graph_shows_where_the_lead_may_move() {
        let rules = rules(Some(&[("new", &["contacted", "lost"]), ("contacted", &["new", "lost"])]));
        insta::assert_snapshot!(states(&rules, Some("contacted")).into_string().replace("><", ">\n<"));
    }

    #[test]
    fn a_state_stands_in_the_column_of_its_distance() {
        let rules = rules(Some(&[("new", &["contacted"]), ("contacted", &["lost", "new"])]));
        let places = places(&rules);
        assert_eq!((places["new"], places["contacted"], places["lost"]), ((0, 0), (1, 0), (2, 0)));
        assert_eq!(places["a <name> that is too long"], (3, 0), "unreachable");
    }

    #[test]
    fn without_transitions_any_is_allowed() {
        let any = Rules { allow_leaving_terminal: true, ..rules(None) };
        let html = states(&any, None).into_string();
        assert!(html.contains("Any transition is allowed.") && !html.contains("class=\"edge"), "{html}");
    }

    #[test]
    fn a_terminal_state_is_left_only_if_the_process_allows_it() {
        let all = ["new", "contacted", "a <name> that is too long"];
        for transitions in [None, Some(&[("lost", &all[..])][..])] {
            let refused = rules(transitions);
            let allowed = Rules { allow_leaving_terminal: true, ..refused.clone() };

            assert_eq!((targets(&refused, "lost"), targets(&allowed, "lost")), (vec![], all.to_vec()));
            let html = states(&refused, Some("lost")).into_string();
            assert!(html.contains("It may move to no other state.") && !html.contains("class=\"edge"), "{html}");
        }
        assert!(states(&rules(None), None).into_string().contains("allowed, except out of a terminal state."));
    }

    #[test]
    fn too_many_states_are_shown_as_a_table() {
        let state = |n| State { name: format!("s{n}"), kind: StateKind::Active, takes_disposition: None };
        let rules = Rules { states: (0..=MAX_DRAWN).map(state).collect(), ..Rules::default() };
        let html = states(&rules, None).into_string();
        assert!(!html.contains("<svg") && html.contains("<td>s40</td>"), "{html}");
    }
}
