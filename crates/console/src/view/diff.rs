//! The lines by which two texts differ.

use maud::{Markup, html};

/// Longer texts are shown as one removed and one added block: the time and memory of the comparison grow with the
/// product of the line counts.
const MAX_LINES: usize = 2000;

/// A line of either text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Line<'a> {
    Same(&'a str),
    Removed(&'a str),
    Added(&'a str),
}

/// The lines of both texts in order, by their longest common subsequence.
fn lines<'a>(old: &'a str, new: &'a str) -> Vec<Line<'a>> {
    let (old, new): (Vec<_>, Vec<_>) = (old.lines().collect(), new.lines().collect());
    if old.len() > MAX_LINES || new.len() > MAX_LINES {
        return old.into_iter().map(Line::Removed).chain(new.into_iter().map(Line::Added)).collect();
    }
    // The length of the longest common subsequence of the rests that begin at each pair of lines.
    let width = new.len() + 1;
    let mut lengths = vec![0_u16; (old.len() + 1) * width];
    for i in (0..old.len()).rev() {
        for j in (0..new.len()).rev() {
            lengths[i * width + j] = if old[i] == new[j] {
                lengths[(i + 1) * width + j + 1] + 1
            } else {
                lengths[(i + 1) * width + j].max(lengths[i * width + j + 1])
            };
        }
    }
    let (mut i, mut j, mut lines) = (0, 0, Vec::new());
    while i < old.len() || j < new.len() {
        if i < old.len() && j < new.len() && old[i] == new[j] {
            lines.push(Line::Same(old[i]));
            (i, j) = (i + 1, j + 1);
        } else if j == new.len() || (i < old.len() && lengths[(i + 1) * width + j] >= lengths[i * width + j + 1]) {
            lines.push(Line::Removed(old[i]));
            i += 1;
        } else {
            lines.push(Line::Added(new[j]));
            j += 1;
        }
    }
    lines
}

/// Both texts, with a sign before each line that only one of them has.
pub(crate) fn diff(title: &str, old: &str, new: &str) -> Markup {
    html! {
        figure.json {
            figcaption { (title) }
            pre.diff tabindex="0" {
                @for line in lines(old, new) {
                    @match line {
                        Line::Same(text) => { "  " (text) },
                        Line::Removed(text) => del { "- " (text) },
                        Line::Added(text) => ins { "+ " (text) },
                    }
                    "\n"
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_lines_stand_between_those_that_stay() {
        let html = diff("Changes", "a\nb\nc\nd", "a\nx\nc\nd\n<e>").into_string();
        insta::assert_snapshot!(html, @r#"
        <figure class="json"><figcaption>Changes</figcaption><pre class="diff" tabindex="0">  a
        <del>- b</del>
        <ins>+ x</ins>
          c
          d
        <ins>+ &lt;e&gt;</ins>
        </pre></figure>
        "#);
        assert_eq!(lines("a\nb", "a\nb"), [Line::Same("a"), Line::Same("b")]);
        assert_eq!((lines("", "a"), lines("a", "")), (vec![Line::Added("a")], vec![Line::Removed("a")]));
    }
}
