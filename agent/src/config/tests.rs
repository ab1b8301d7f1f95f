use super::*;

fn surroundings() -> Surroundings {
    Surroundings { hostname: "web-1".to_owned(), machine_id: Some("0123456789abcdef0123456789abcdef".to_owned()) }
}

fn parse_text(text: &str) -> Result<AgentConfig, ConfigErrors> {
    AgentConfig::parse(Path::new("agent.toml"), text, &surroundings())
}

const FIVE_LINES: &str = r#"
endpoints = ["http://edge-1:7700", "http://edge-2:7700"]
[[source]]
category = "nginx-access"
include = ["/var/log/nginx/access.log*"]
"#;

#[test]
fn five_lines_are_enough() {
    let config = parse_text(FIVE_LINES).expect("a good file");
    assert_eq!(config.endpoints.len(), 2);
    assert_eq!(config.host, "web-1");
    assert_eq!(config.data_dir, Path::new("/var/lib/tributary-agent"));
    assert_eq!(config.http_listen, Some("127.0.0.1:7701".parse().expect("an address")));
    assert_eq!((config.batch.max_bytes, config.limits.max_buffer_bytes), (MIB, 24 * MIB));
    assert_eq!((config.compression.codec, config.compression.level), (None, 1));
    let source = &config.sources[0];
    assert!(source.matches(Path::new("/var/log/nginx/access.log.1")) && source.timestamp.is_none());
    assert_eq!((source.read_from, source.long_lines), (ReadFrom::Beginning, LongLines::Split));
}

#[test]
fn the_agent_id_comes_from_the_machine_and_does_not_tell_its_machine_id() {
    let id = parse_text(FIVE_LINES).expect("a good file").agent_id;
    assert_eq!(id, parse_text(FIVE_LINES).expect("a good file").agent_id, "it stays the same");
    assert!(!id.as_str().contains("0123456789abcdef"));
    let none = Surroundings { machine_id: None, ..surroundings() };
    let error = AgentConfig::parse(Path::new("agent.toml"), FIVE_LINES, &none).expect_err("no id").to_string();
    assert!(error.contains("write agent_id ="), "{error}");
    let named = format!("agent_id = \"web-7\"\n{FIVE_LINES}");
    let config = AgentConfig::parse(Path::new("agent.toml"), &named, &none).expect("a good file");
    assert_eq!(config.agent_id.as_str(), "web-7");
}

#[test]
fn every_field_can_be_written() {
    let config = parse_text(
        r#"
endpoints = "http://edge-1:7700"
agent_id = "web-1"
host = "web-1.example.net"
data_dir = "/srv/agent"
refresh_interval = "1s"
drain_timeout = "5s"
connect_timeout = "1s"
request_timeout = "10s"
max_connection_age = "1m"
backoff = { initial = "100ms", max = "5s" }
bytes_per_second = "10 MiB"
[http]
enabled = false
[log]
format = "json"
level = "debug"
[limits]
max_open_files = 100
max_held_bytes = "1 GiB"
max_buffer_bytes = "8 MiB"
[batch]
max_bytes = "256 KiB"
timeout = "200ms"
[compression]
codec = "zstd"
level = 3
threads = 2
[[source]]
category = "app"
include = ["/srv/app/*.log", "/srv/app/*.log.[0-9]"]
exclude = "/srv/app/debug.log"
read_from = "end"
ignore_older = "7d"
rotate_wait = "1s"
partial_line_timeout = "2s"
max_line_bytes = "64 KiB"
long_lines = "drop"
record_prefix = "{host}\t{agent_id}\t{category}\t"
[source.timestamp]
format = ["%d/%b/%Y:%H:%M:%S %z", "%Y-%m-%d %H:%M:%S"]
after = "["
timezone = "Europe/Berlin"
[[source]]
category = "app"
include = "/srv/other.log"
"#,
    )
    .expect("a good file");
    assert_eq!(config.http_listen, None);
    assert_eq!(config.bytes_per_second, Some(10 * MIB));
    assert_eq!(config.compression.codec, Some(Codec::Zstd));
    let source = &config.sources[0];
    assert_eq!(&source.record_prefix[..], b"web-1.example.net\tweb-1\tapp\t");
    assert!(!source.matches(Path::new("/srv/app/debug.log")) && source.matches(Path::new("/srv/app/a.log")));
    let timestamp = source.timestamp.as_ref().expect("it is written");
    assert_eq!((timestamp.formats.len(), &timestamp.after[..]), (2, &b"["[..]));
    assert_eq!(timestamp.timezone.iana_name(), Some("Europe/Berlin"));
}

#[test]
fn all_that_is_wrong_is_reported_at_once() {
    let text = r#"endpoints = ["edge-1", "https://edge-2:7700"]
hots = "x"
request_timeout = "2s"
backoff = { initial = "40s" }
bytes_per_second = 0

[batch]
max_bytes = "64 KiB"
timeout = 5

[[source]]
category = "Nginx"
include = ["logs/*.log", "/var/log/[a"]
max_line_bytes = "128 KiB"
record_prefix = "{path} "
[source.timestamp]
format = "%H:%M"
timezone = "Mars/Olympus"

[[source]]
category = "app"
include = "/var/log/app.log"
[[source]]
category = "app"
include = "/var/log/app.log"
"#;
    let errors = parse_text(text).expect_err("a bad file");
    let shown = errors.to_string();
    for (place, title) in [
        ("1:14", "\"edge-1\" is not an endpoint"),
        ("1:24", "does not begin with http://"),
        ("2:1", "unknown key `hots`"),
        ("3:19", "this must hold: connect_timeout < request_timeout"),
        ("4:23", "this must hold: backoff.initial <= backoff.max"),
        ("5:20", "`bytes_per_second` is out of bounds"),
        ("9:11", "`batch.timeout` has no unit"),
        ("12:12", "the category \"Nginx\" is not allowed"),
        ("13:12", "the pattern \"logs/*.log\" is relative"),
        ("13:26", "the pattern \"/var/log/[a\" can't be read"),
        ("14:18", "this must hold: source.max_line_bytes <= batch.max_bytes"),
        ("15:17", "the unknown placeholder {path}"),
        ("17:10", "doesn't say"),
        ("18:12", "there is no time zone \"Mars/Olympus\""),
        ("25:11", "\"/var/log/app.log\" is included twice"),
    ] {
        let found = shown
            .split("error: ")
            .any(|error| error.contains(title) && error.contains(&format!("agent.toml:{place}\n")));
        assert!(found, "{place} {title} is missing in:\n{shown}");
    }
    assert_eq!(errors.count(), 15, "{shown}");
}

#[test]
fn an_empty_file_says_what_belongs_into_it() {
    let shown = parse_text("").expect_err("nothing in it").to_string();
    assert!(shown.contains("write endpoints = [\"http://edge-1:7700\"]"), "{shown}");
    assert!(shown.contains("write [[source]]"), "{shown}");
    assert!(shown.ends_with("2 errors in agent.toml"), "{shown}");
}

#[test]
fn this_machine_can_be_asked() {
    assert!(!Surroundings::of_this_machine().hostname.is_empty());
}

const TOPOLOGY: &str = r#"
[cluster]
name = "prod"
[sink]
uri = "file:///srv/logs"
[[tier]]
name = "edge"
parent = "root"
[[tier.node]]
name = "edge-1"
address = "10.0.0.11:7700"
[[tier.node]]
name = "edge-2"
address = "10.0.0.12:7700"
[[tier]]
name = "root"
[[tier.node]]
name = "root-1"
address = "10.0.0.21:7700"
[category.nginx-access]
"#;

/// Loads an agent's file that stands beside the topology above.
fn load_beside_topology(text: &str) -> Result<AgentConfig, ConfigErrors> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    std::fs::write(dir.path().join("topology.toml"), TOPOLOGY).expect("written");
    AgentConfig::parse(&dir.path().join("agent.toml"), text, &surroundings())
}

#[test]
fn endpoints_may_come_from_the_topology() {
    let text = |id: u32| {
        format!(
            "agent_id = 'web-{id}'\ntopology = 'topology.toml'\ntier = 'edge'\n[[source]]\ncategory = 'nginx-access'\n\
             include = '/var/log/a'\n"
        )
    };
    let mut preferred = std::collections::BTreeMap::new();
    for id in 0..32 {
        let config = load_beside_topology(&text(id)).expect("a good file");
        assert_eq!(config.endpoints.len(), 2);
        *preferred.entry(config.endpoints[0].clone()).or_insert(0) += 1;
    }
    assert!(preferred.len() == 2 && preferred.values().all(|&count| count > 5), "they spread: {preferred:?}");
}

#[test]
fn a_category_that_is_not_in_the_topology_is_an_error() {
    let text =
        "topology = 'topology.toml'\ntier = 'egde'\n[[source]]\ncategory = 'nginx-acess'\ninclude = '/var/log/a'\n";
    let shown = load_beside_topology(text).expect_err("a bad file").to_string();
    assert!(shown.contains("there is no category \"nginx-acess\" in the topology"), "{shown}");
    assert!(shown.contains("did you mean \"nginx-access\"?"), "{shown}");
    assert!(shown.contains("there is no tier \"egde\" in the topology"), "{shown}");
}

#[test]
fn a_tier_needs_its_topology_and_no_endpoints() {
    let source = "[[source]]\ncategory = 'a'\ninclude = '/var/log/a'\n";
    let shown = parse_text(&format!("tier = 'edge'\n{source}")).expect_err("no topology").to_string();
    assert!(shown.contains("`topology` is missing"), "{shown}");
    let shown =
        parse_text(&format!("tier = 'edge'\nendpoints = 'http://e:1'\n{source}")).expect_err("both").to_string();
    assert!(shown.contains("`endpoints` and `tier` are both written"), "{shown}");
    let shown =
        parse_text(&format!("endpoints = ['http://e:1', 'http://E:1/']\n{source}")).expect_err("twice").to_string();
    assert!(shown.contains("has http://e:1 twice"), "{shown}");
}

/// A file of the directory `deploy`.
fn deployed(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(name)
}

#[test]
fn the_example_is_a_good_file() {
    let content = std::fs::read_to_string(deployed("agent.toml")).expect("it is there");
    let config = AgentConfig::parse(&deployed("agent.toml"), &content, &surroundings())
        .unwrap_or_else(|errors| panic!("{errors}"));
    let topology = Topology::load(&deployed("topology.toml")).unwrap_or_else(|errors| panic!("{errors}"));
    for source in &config.sources {
        assert!(topology.category(&source.category).is_some(), "{} is not in the example topology", source.category);
    }
    let edges: Vec<_> =
        topology.tier("edge").expect("it is there").nodes.iter().map(|node| node.endpoint.clone()).collect();
    assert_eq!(config.endpoints, edges, "the agents of the example find its edges");
}

/// What the example shows as defaults, in its comments, are the defaults.
#[test]
fn the_defaults_in_the_examples_comments_are_the_defaults() {
    let content = std::fs::read_to_string(deployed("agent.toml")).expect("it is there");
    // Keys whose comment shows a value that isn't the default, but what a value may look like.
    let illustrations = [
        "topology",
        "tier",
        "agent_id",
        "host",
        "bytes_per_second",
        "codec",
        "exclude",
        "ignore_older",
        "record_prefix",
    ];
    let written: String = content
        .lines()
        .map(|line| {
            let shown = line.strip_prefix("# ").unwrap_or(line);
            let key = shown.split(" =").next().unwrap_or("");
            let is_key = !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
            let is_default =
                (shown.contains(" = ") && is_key && !illustrations.contains(&key)) || shown.starts_with("[");
            if is_default { format!("{shown}\n") } else { format!("{line}\n") }
        })
        .collect();
    let parse = |text: &str| {
        AgentConfig::parse(Path::new("agent.toml"), text, &surroundings()).unwrap_or_else(|errors| panic!("{errors}"))
    };
    let uncommented = written.lines().filter(|line| !line.starts_with('#') && line.contains(" = ")).count();
    assert!(uncommented > 25, "the comments were found: {uncommented} keys\n{written}");
    assert_eq!(format!("{:?}", parse(&written)), format!("{:?}", parse(&content)));
}

#[test]
fn the_unit_gives_the_agent_the_time_and_the_files_that_it_is_configured_for() {
    let unit = std::fs::read_to_string(deployed("tributary-agent.service")).expect("it is there");
    let value =
        |key: &str| unit.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('=')).expect(key).to_owned();
    let config = parse_text(FIVE_LINES).expect("a good file");
    let stop = tributary_common::config::parse_duration(&value("TimeoutStopSec")).expect("a duration");
    assert!(stop > config.drain_timeout, "TimeoutStopSec > drain_timeout");
    let files: u32 = value("LimitNOFILE").parse().expect("a number");
    assert!(files > 2 * config.limits.max_open_files, "LimitNOFILE > 2 * limits.max_open_files");
    assert_eq!(value("RestartPreventExitStatus"), "64 78");
    assert_eq!(value("Type"), "notify");
    assert!(value("ExecStart").ends_with(" run --config /etc/tributary/agent.toml"));
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(300))]

    /// Whatever is done to the example with all settings, it is read, or its errors are shown.
    #[test]
    fn any_text_is_read_or_its_errors_are_shown(
        edits in proptest::collection::vec((proptest::prelude::any::<proptest::sample::Index>(), 0_usize..12, "[\\[\\]=\"'.#{}\r\n\t aé日0-]{0,4}"), 1..6),
    ) {
        let mut text: Vec<char> = include_str!("../../../deploy/agent.toml").chars().collect();
        for (at, removed, inserted) in edits {
            let at = at.index(text.len());
            let end = (at + removed).min(text.len());
            text.splice(at..end, inserted.chars());
        }
        if let Err(errors) = parse_text(&text.into_iter().collect::<String>()) {
            proptest::prop_assert!(errors.to_string().contains("error: "));
        }
    }
}
