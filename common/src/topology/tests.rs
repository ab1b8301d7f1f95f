use std::time::Duration;

use super::*;
use crate::bucket::BucketSize;
use crate::config::{GIB, KIB, MIB};
use crate::frame::Codec;

const SMALL: &str = r#"
[cluster]
name = "prod"
[sink]
uri = "hdfs://nn1:8020/logs"
[[tier]]
name = "root"
[[tier.node]]
name = "root-1"
address = "10.0.0.21:7700"
[category.nginx-access]
"#;

const TREE: &str = r#"
[cluster]
name = "prod"
lanes = 2
[sink]
uri = "file:///srv/logs/"

[[tier]]
name = "edge-eu"
parent = "mid"
[[tier.node]]
name = "eu-1"
address = "10.1.0.11:7700"
[[tier.node]]
name = "eu-2"
address = "10.1.0.12:7700"

[[tier]]
name = "edge-us"
parent = "root"
[[tier.node]]
name = "us-1"
address = "10.2.0.11:7700"

[[tier]]
name = "mid"
parent = "root"
[[tier.node]]
name = "mid-1"
address = "mid-1.example.net:7700"

[[tier]]
name = "root"
[[tier.node]]
name = "root-1"
address = "10.0.0.21:7700"
[[tier.node]]
name = "root-2"
address = "10.0.0.22:7700"

[category.nginx-access]
[category.app]
bucket = "15m"
codec = "zstd"
roll_size = "128 MiB"
close_delay = "30s"
"#;

fn parse(text: &str) -> Topology {
    Topology::parse("topology.toml", text).unwrap_or_else(|errors| panic!("{errors}"))
}

fn errors(text: &str) -> String {
    Topology::parse("topology.toml", text).expect_err("the file is wrong").to_string()
}

#[test]
fn a_small_file_gets_safe_defaults() {
    let topology = parse(SMALL);
    assert_eq!((topology.cluster(), topology.lanes()), ("prod", LaneCount::ONE));
    assert_eq!(topology.sink().kind, SinkKind::Hdfs);
    assert_eq!((topology.sink().replication, topology.sink().min_replication), (None, 2));
    assert_eq!((topology.root().roll_size, topology.root().settle), (GIB, Duration::from_secs(60)));
    assert_eq!(topology.root().success_file, "_SUCCESS");
    let category = topology.category(&"nginx-access".parse().expect("a name")).expect("it is there");
    assert_eq!((category.bucket, category.codec, category.roll_size), (BucketSize::HOUR, Codec::Gzip, GIB));
    assert!(topology.is_root("root-1") && topology.parents_of("root-1").is_empty());
}

#[test]
fn nodes_find_themselves_and_their_parents() {
    let topology = parse(TREE);
    let names = |nodes: &[Node]| nodes.iter().map(|node| node.name.to_string()).collect::<Vec<_>>();
    assert_eq!(names(topology.parents_of("eu-2")), ["mid-1"]);
    assert_eq!(names(topology.parents_of("mid-1")), ["root-1", "root-2"]);
    let place = topology.node("eu-2").expect("it is there");
    assert_eq!((place.tier.name.as_str(), place.node.endpoint.as_str()), ("edge-eu", "http://10.1.0.12:7700"));
    assert!(!place.is_root() && topology.is_root("root-2") && topology.node("nobody").is_none());
    assert_eq!(topology.root_tier().name.as_str(), "root");
    assert_eq!((topology.sink().uri.as_str(), topology.root().settle), ("file:///srv/logs", Duration::ZERO));
}

#[test]
fn categories_inherit_what_they_do_not_say() {
    let text = TREE.replace("[sink]", "[root]\nidle_timeout = \"5m\"\n[sink]");
    let topology = parse(&text);
    let app = topology.category(&"app".parse().expect("a name")).expect("it is there");
    assert_eq!((app.roll_size, app.close_delay), (128 * MIB, Duration::from_secs(30)));
    assert_eq!((app.idle_timeout, app.bucket.seconds()), (Duration::from_secs(300), 900));
    let told = topology.for_agents();
    assert_eq!((told.lanes.get(), told.categories.len()), (2, 2));
    assert_eq!(told.categories[&"app".parse().expect("a name")].codec, Codec::Zstd);
}

#[test]
fn the_tree_is_drawn() {
    let expected = "\
cluster prod, 2 lanes
fingerprint FINGERPRINT

file:///srv/logs
└◀─ ┌─ root ─────────────────────────┐
    │ root-1  10.0.0.21:7700  lane 1 │
    │ root-2  10.0.0.22:7700  lane 0 │
    └─┬──────────────────────────────┘
      ├◀─ ┌─ edge-us ────────────┐
      │   │ us-1  10.2.0.11:7700 │
      │   └─┬────────────────────┘
      │     └◀─ agents
      └◀─ ┌─ mid ─────────────────────────┐
          │ mid-1  mid-1.example.net:7700 │
          └─┬─────────────────────────────┘
            └◀─ ┌─ edge-eu ────────────┐
                │ eu-1  10.1.0.11:7700 │
                │ eu-2  10.1.0.12:7700 │
                └─┬────────────────────┘
                  └◀─ agents

categories
  app           zstd, buckets of 15m (UTC) that close after 30s more, files of up to 128 MiB
  nginx-access  gzip, buckets of 1h (UTC) that close after 2m more, files of up to 1 GiB
";
    let topology = parse(TREE);
    assert_eq!(topology.draw(), expected.replace("FINGERPRINT", &topology.fingerprint()));
}

#[test]
fn all_that_is_wrong_is_reported_at_once() {
    let text = r#"
[cluster]
name = "Prod"
lanes = 0
[sink]
uri = "s3://bucket/logs"
call_timeout = "70s"
replication = 1
min_replication = 2
kerberos_principal = "a@B"
[root]
takeover_after = "2m"
success_file = "DONE"
close_delay = "7h"
recompress_below = 0
[spool]
max_age = "40d"
segment_bytes = "4 GiB"
max_bytes = "5 GiB"
[limits]
max_request_bytes = "1 GiB"
[[tier]]
name = "edge"
parent = "rot"
[[tier.node]]
name = "n1"
address = "10.0.0.1"
[[tier]]
name = "root"
[[tier.node]]
name = "n1"
address = "a:1"
[category.Nginx]
[category.app]
bucket = "7m"
timezone = "Europe/Berlin"
[category.tiny]
roll_size = "1 MiB"
"#;
    let shown = errors(text);
    for (place, title) in [
        ("3:8", "can't name a cluster"),
        ("4:9", "`cluster.lanes` is out of bounds"),
        ("6:7", "is neither a file:// nor an hdfs:// URI"),
        ("7:16", "this must hold: forward.request_timeout > sink.call_timeout"),
        ("9:19", "this must hold: sink.min_replication <= sink.replication"),
        ("10:22", "sink.kerberos_principal is set if and only if"),
        ("12:18", "this must hold: root.takeover_after > 2 * sink.call_timeout"),
        ("13:16", "the success file can't have the name"),
        ("14:15", "this must hold: root.close_delay < root.give_up_after"),
        ("17:11", "this must hold: spool.max_age < root.stream_ttl"),
        ("18:17", "this must hold: 2 * spool.segment_bytes <= spool.max_bytes"),
        ("19:13", "this must hold: spool.segment_bytes + 2 * limits.max_request_bytes <= spool.max_bytes"),
        ("21:21", "this must hold: limits.max_request_bytes <= limits.max_in_flight_bytes"),
        ("27:11", "\"10.0.0.1\" is not an address"),
        ("33:11", "the category \"Nginx\" is not allowed"),
        ("35:10", "`category.app.bucket` doesn't divide a day"),
        ("36:12", "buckets can't be aligned to \"Europe/Berlin\""),
        ("38:13", "this must hold: root.commit_bytes <= category.tiny.roll_size"),
    ] {
        let at = format!("topology.toml:{place}\n");
        let found = shown.split("error: ").any(|error| error.contains(title) && error.contains(&at));
        assert!(found, "{place} {title} is missing in:\n{shown}");
    }
    assert!(shown.ends_with("18 errors in topology.toml"), "{shown}");
}

#[test]
fn no_category_may_wait_for_an_agent_for_longer_than_it_is_expected() {
    let with =
        |root: &str, category: &str, roster: &str| format!("{SMALL}{category}\n[root]\n{root}\n[roster]\n{roster}\n");
    let shown = errors(&with("", "give_up_after = \"2d\"", "forget_after = \"2d\""));
    assert!(shown.contains("this must hold: category.nginx-access.give_up_after < roster.forget_after"), "{shown}");
    assert!(shown.ends_with("1 error in topology.toml"), "{shown}");
    let shown = errors(&with("give_up_after = \"2d\"", "", "forget_after = \"1d\""));
    assert!(shown.contains("this must hold: root.give_up_after < roster.forget_after"), "{shown}");
    assert!(shown.ends_with("1 error in topology.toml"), "what a category inherits is said once: {shown}");
    // A category that waits for less is no matter.
    parse(&with("", "give_up_after = \"1d\"", "forget_after = \"2d\""));
}

#[test]
fn a_tier_without_its_parent_is_named() {
    let shown = errors(&TREE.replace("parent = \"mid\"", "parent = \"midd\""));
    assert!(shown.contains("there is no tier \"midd\"") && shown.contains("did you mean \"mid\"?"), "{shown}");
}

#[test]
fn there_is_exactly_one_root_tier_and_no_circle() {
    let several = errors(&TREE.replace("name = \"mid\"\nparent = \"root\"", "name = \"mid\""));
    assert!(several.contains("several tiers have no parent"), "{several}");
    let none = errors(&TREE.replace("name = \"root\"\n", "name = \"root\"\nparent = \"mid\"\n"));
    assert!(none.contains("no tier is the root tier"), "{none}");
    let circle = errors(&TREE.replace("name = \"mid\"\nparent = \"root\"", "name = \"mid\"\nparent = \"edge-eu\""));
    assert!(circle.contains("would send to itself in the end"), "{circle}");
    assert!(circle.ends_with("1 error in topology.toml"), "a circle is one error: {circle}");
    let itself = errors(&TREE.replace("name = \"mid\"\nparent = \"root\"", "name = \"mid\"\nparent = \"mid\""));
    assert!(itself.contains("the tier \"mid\" would send to itself"), "{itself}");
}

#[test]
fn names_and_addresses_are_there_once() {
    let name = errors(&TREE.replace("name = \"us-1\"", "name = \"eu-1\""));
    assert!(name.contains("two nodes have the name \"eu-1\"") && name.contains("topology.toml:22:"), "{name}");
    let address = errors(&TREE.replace("10.2.0.11", "10.1.0.11"));
    assert!(address.contains("two nodes have the address \"10.1.0.11:7700\""), "{address}");
    let tier = errors(&TREE.replace("name = \"edge-us\"", "name = \"edge-eu\""));
    assert!(tier.contains("two tiers have the name \"edge-eu\""), "{tier}");
}

#[test]
fn an_empty_file_says_what_belongs_into_it() {
    let shown = errors("");
    for needed in ["`name` is missing in `cluster`", "`uri` is missing in `sink`", "[[tier]]", "[category.<name>]"] {
        assert!(shown.contains(needed), "{needed} in {shown}");
    }
    let shown = errors("[[tier]]\nname = 'root'\n[cluster]\nname='x'\n[sink]\nuri='file:///a'\n[category.a]\n");
    assert!(shown.contains("this tier has no node") && shown.ends_with("1 error in topology.toml"), "{shown}");
}

#[test]
fn sinks_that_would_write_elsewhere_than_meant_are_refused() {
    for bad in
        ["/srv/logs", "file://srv/logs", "file:///", "file:///a/../b", "hdfs:///logs", "hdfs://nn1", "hdfs://n n/a"]
    {
        let shown = errors(&SMALL.replace("hdfs://nn1:8020/logs", bad));
        assert!(shown.contains("topology.toml:5:7") && shown.ends_with("1 error in topology.toml"), "{bad}: {shown}");
    }
    assert_eq!(parse(&SMALL.replace("nn1:8020", "nameservice1")).sink().uri, "hdfs://nameservice1/logs");
}

#[test]
fn settling_may_be_skipped_only_on_files() {
    let shown = errors(&format!("{SMALL}\n[root]\nsettle = \"0s\"\n"));
    assert!(shown.contains("0s is not within 1s to 10m"), "{shown}");
    let topology = parse(&format!("{TREE}\n[root]\nsettle = \"0s\"\nrecompress_below = 0\n"));
    assert_eq!((topology.root().settle, topology.root().recompress_below), (Duration::ZERO, 0));
}

#[test]
fn the_fingerprint_is_of_the_meaning() {
    let topology = parse(TREE);
    let spelled = TREE.replace("bucket = \"15m\"", "bucket = \"900s\" # a comment");
    assert_eq!(topology.fingerprint(), parse(&spelled).fingerprint());
    let (head, tail) = TREE.split_at(TREE.find("[[tier]]\nname = \"edge-us\"").expect("it is there"));
    let (us, rest) = tail.split_at(tail.find("[[tier]]\nname = \"mid\"").expect("it is there"));
    let (mid, rest) = rest.split_at(rest.find("[[tier]]\nname = \"root\"").expect("it is there"));
    assert_eq!(topology.fingerprint(), parse(&format!("{head}{mid}{us}{rest}")).fingerprint(), "order means nothing");
    let defaults = TREE.replace("[sink]", "[spool]\nmax_age = \"7d\"\n[sink]");
    assert_eq!(topology.fingerprint(), parse(&defaults).fingerprint(), "the default, written down");
    for (from, to) in [("lanes = 2", "lanes = 3"), ("eu-2", "eu-3"), ("zstd", "gzip"), ("10.1.0.12", "10.1.0.13")] {
        assert_ne!(topology.fingerprint(), parse(&TREE.replace(from, to)).fingerprint(), "{from} -> {to}");
    }
}

#[test]
fn only_the_lanes_of_a_lost_root_move() {
    let nodes = |count: u32| -> Vec<Node> {
        let node = |n| {
            let address = format!("10.0.0.{n}:7700");
            let endpoint = Endpoint::at(&address).expect("an address");
            Node { name: format!("root-{n}").parse().expect("a name"), address, endpoint }
        };
        (0..count).map(node).collect()
    };
    let (four, three) = (nodes(4), nodes(3));
    let mut counts = [0_u32; 4];
    for lane in 0..1000_u32 {
        let key = lane.to_le_bytes();
        let (before, after) = (rendezvous(&key, &four), rendezvous(&key, &three));
        let survivors: Vec<_> = before.iter().filter(|node| node.name.as_str() != "root-3").copied().collect();
        assert_eq!(survivors, after, "the order of the others stays");
        counts[four.iter().position(|node| node == before[0]).expect("one of them")] += 1;
    }
    assert!(counts.iter().all(|&count| count > 180), "{counts:?}");
}

#[test]
fn no_root_comes_first_for_more_lanes_than_its_share() {
    for (lanes, roots) in [(2, 2), (3, 2), (4, 4), (7, 3), (16, 5), (2, 3)] {
        let nodes: String = (0..roots)
            .map(|n| format!("[[tier.node]]\nname = \"root-{n}\"\naddress = \"10.0.0.1:{}\"\n", 7700 + n))
            .collect();
        let text = format!(
            "[cluster]\nname = \"t\"\nlanes = {lanes}\n[sink]\nuri = \"file:///x\"\n[category.a]\n[[tier]]\nname = \"root\"\n{nodes}"
        );
        let topology = parse(&text);
        let mut first_for = BTreeMap::new();
        for lane in topology.lanes().lanes() {
            let mut order: Vec<_> = topology.roots_of(lane).into_iter().map(|node| node.name.clone()).collect();
            *first_for.entry(order[0].clone()).or_insert(0_usize) += 1;
            order.sort();
            order.dedup();
            assert_eq!(order.len(), roots, "each root comes once for lane {lane}");
        }
        let share = usize::from(topology.lanes().get()).div_ceil(roots);
        assert!(first_for.values().all(|&count| count <= share), "{lanes} lanes: {first_for:?}");
    }
}

#[test]
fn lanes_have_an_agent_and_a_preferred_root() {
    let topology = parse(TREE);
    let lane = topology.lane_of(&"web-1".parse().expect("an id"));
    assert!(lane.0 < 2);
    assert!(topology.root_tier().nodes.contains(topology.preferred_root(lane)));
    assert_eq!(parse(TREE).preferred_root(lane), topology.preferred_root(lane), "it stays the same");
    let sizes = topology.limits();
    assert_eq!(
        (sizes.max_request_bytes, topology.spool().segment_bytes, sizes.min_body_rate),
        (32 * MIB, 64 * MIB, 4 * KIB)
    );
}

mod any_text {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        /// Whatever is done to a file, it is read or its errors are shown, at a line that it has.
        #[test]
        fn is_read_or_its_errors_are_shown(
            edits in proptest::collection::vec((any::<prop::sample::Index>(), 0_usize..12, "[\\[\\]=\"'.#{}\r\n\t aé日0-]{0,4}"), 1..6),
        ) {
            let mut text: Vec<char> = TREE.chars().collect();
            for (at, removed, inserted) in edits {
                let at = at.index(text.len().max(1)).min(text.len());
                let end = (at + removed).min(text.len());
                text.splice(at..end, inserted.chars());
            }
            let text: String = text.into_iter().collect();
            if let Err(errors) = Topology::parse("t.toml", &text) {
                let shown = errors.to_string();
                prop_assert_eq!(shown.matches("error: ").count() >= errors.count(), true);
                let lines = text.split('\n').count();
                for place in shown.lines().filter_map(|line| line.trim_start().strip_prefix("--> t.toml:")) {
                    let line: usize = place.split(':').next().and_then(|line| line.parse().ok()).expect("a line number");
                    prop_assert!((1..=lines).contains(&line), "{place} of {lines} lines");
                }
                prop_assert!(errors.render(true).len() >= shown.len());
            }
        }
    }
}
