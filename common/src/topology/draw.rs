//! The tree as text.

use std::time::Duration;

use super::{Tier, Topology};
use crate::config::{show_duration, show_size};
use crate::frame::Codec;

pub(super) fn draw(topology: &Topology) -> String {
    let mut lines = vec![
        format!(
            "cluster {}, {} lane{}",
            topology.cluster(),
            topology.lanes().get(),
            plural(topology.lanes().get().into())
        ),
        format!("fingerprint {}", topology.fingerprint()),
        String::new(),
        topology.sink().uri.clone(),
    ];
    lines.extend(branch(&tier(topology, topology.root_tier()), true));
    lines.push(String::new());
    lines.push("categories".to_owned());
    let width = topology.categories().keys().map(|name| name.as_str().len()).max().unwrap_or(0);
    for (name, category) in topology.categories() {
        let codec = match category.codec {
            Codec::Gzip => "gzip",
            Codec::Zstd => "zstd",
        };
        lines.push(format!(
            "  {:width$}  {codec}, buckets of {} ({}) that close after {} more, files of up to {}",
            name.as_str(),
            show_duration(Duration::from_secs(category.bucket.seconds().into())),
            category.timezone,
            show_duration(category.close_delay),
            show_size(category.roll_size),
        ));
    }
    lines.push(String::new());
    lines.join("\n")
}

fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
}

/// A tier's box, and below it those that send to it.
fn tier(topology: &Topology, tier: &Tier) -> Vec<String> {
    let names = tier.nodes.iter().map(|node| node.name.as_str().len()).max().unwrap_or(0);
    let rows: Vec<String> = tier
        .nodes
        .iter()
        .map(|node| {
            let mut row = format!("{:names$}  {}", node.name.as_str(), node.address);
            if tier.parent.is_none() {
                let preferred =
                    topology.lanes().lanes().filter(|lane| topology.preferred_root(*lane).name == node.name);
                let lanes: Vec<String> = preferred.map(|lane| lane.to_string()).collect();
                row.push_str(&match lanes.as_slice() {
                    [] => "  no lane".to_owned(),
                    [lane] => format!("  lane {lane}"),
                    many if many.len() > 8 => format!("  {} lanes", many.len()),
                    many => format!("  lanes {}", many.join(" ")),
                });
            }
            row
        })
        .collect();
    let heading = format!(" {} ", tier.name);
    let inside = rows.iter().map(|row| row.chars().count() + 2).max().unwrap_or(0).max(heading.len() + 2);
    let mut lines = vec![format!("┌─{heading}{}┐", "─".repeat(inside - heading.len() - 1))];
    lines.extend(rows.iter().map(|row| format!("│ {row:<width$}│", width = inside - 1)));
    lines.push(format!("└─┬{}┘", "─".repeat(inside - 2)));
    let children: Vec<&Tier> =
        topology.tiers().iter().filter(|child| child.parent.as_ref() == Some(&tier.name)).collect();
    let drawn: Vec<Vec<String>> = if children.is_empty() {
        vec![vec!["agents".to_owned()]]
    } else {
        children.iter().map(|child| self::tier(topology, child)).collect()
    };
    let last = drawn.len() - 1;
    for (n, child) in drawn.iter().enumerate() {
        lines.extend(branch(child, n == last).into_iter().map(|line| format!("  {line}")));
    }
    lines
}

/// Hangs drawn lines onto the one above; data flows along the arrow.
fn branch(drawn: &[String], last: bool) -> Vec<String> {
    let (first, rest) = if last { ("└◀─ ", "    ") } else { ("├◀─ ", "│   ") };
    drawn.iter().enumerate().map(|(n, line)| format!("{}{line}", if n == 0 { first } else { rest })).collect()
}
