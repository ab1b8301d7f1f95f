use std::time::Duration;

use super::kind::{choice, duration, flag, integer, list, size, text};
use super::*;

#[derive(Debug)]
struct Sample {
    name: String,
    roll_size: u64,
    interval: Duration,
    depth: u16,
    on: bool,
    words: Vec<String>,
    servers: Vec<String>,
}

fn read(root: &mut Table<'_>) -> Read<Sample> {
    let name = root.required("name", text().example("\"prod\""));
    let mut limits = root.table("limits");
    let roll_size = limits.or("roll_size", size(MIB..=GIB), 64 * MIB);
    let interval =
        limits.or("interval", duration(Duration::from_millis(50)..=Duration::from_secs(60)), Duration::from_secs(1));
    let call_timeout =
        limits.or("call_timeout", duration(Duration::ZERO..=Duration::from_secs(600)), Duration::from_secs(20));
    limits.require(
        *interval < *call_timeout,
        "limits.interval < limits.call_timeout",
        "make the interval shorter or the timeout longer",
        &[interval.place(), call_timeout.place()],
    );
    let depth = limits.or("depth", integer(1..=256), 4_u16);
    let on = root.or("on", flag(), true);
    let codec = root.or("codec", choice(&[("gzip", 1), ("zstd", 2)]), 1);
    let words = root.or("words", list(text()), vec![format!("w{}", *codec)]);
    let mut servers = Vec::new();
    for mut server in root.tables("server") {
        servers.push(server.required("host", text().example("\"web-1\"")));
    }
    Ok(Sample {
        name: name?.into_value(),
        roll_size: *roll_size,
        interval: *interval,
        depth: *depth,
        on: *on,
        words: words.into_value(),
        servers: servers.into_iter().map(|host| host.map(Field::into_value)).collect::<Read<_>>()?,
    })
}

fn errors(text: &str) -> String {
    parse("sample.toml", text, read).expect_err("the file is wrong").to_string()
}

#[test]
fn a_good_file_gives_its_values_and_the_defaults() {
    let text = "name = 'n'\nwords = 'one'\n[limits]\nroll_size = '2 MiB'\ndepth = 0x10\n[[server]]\nhost = 'a'\n";
    let sample = parse("sample.toml", text, read).expect("a good file");
    assert_eq!((sample.name.as_str(), sample.roll_size, sample.depth, sample.on), ("n", 2 << 20, 16, true));
    assert_eq!(
        (sample.interval, sample.words, sample.servers),
        (Duration::from_secs(1), vec!["one".to_owned()], vec!["a".to_owned()])
    );
}

#[test]
fn all_errors_are_reported_in_one_run_in_the_order_of_the_file() {
    let text = r#"nmae = "x"
on = "yes"
codec = "gzp"
words = ["a", 2, ""]

[limits]
roll_size = 64
interval = "10ms"
depth = 300
nonsense = 1

[[server]]
"#;
    let expected = r#"error: `name` is missing
 --> sample.toml:1:1
  |
1 | nmae = "x"
  | ^ `name` belongs here
  |
  = help: write name = "prod"

error: unknown key `nmae`
 --> sample.toml:1:1
  |
1 | nmae = "x"
  | ^^^^ unknown
  |
  = help: did you mean `name`?

error: `on` must be true or false, without quotes
 --> sample.toml:2:6
  |
2 | on = "yes"
  |      ^^^^^ this is a string
  |
  = help: write on = true

error: `codec` can't be "gzp"
 --> sample.toml:3:9
  |
3 | codec = "gzp"
  |         ^^^^^ unknown
  |
  = help: did you mean "gzip"? All that is possible: "gzip", "zstd"

error: `words` must be text
 --> sample.toml:4:15
  |
4 | words = ["a", 2, ""]
  |               ^ this is a number
  |
  = help: write words = "…"

error: `words` is empty
 --> sample.toml:4:18
  |
4 | words = ["a", 2, ""]
  |                  ^^ nothing is written here
  |
  = help: write a value, or leave the line out

error: `limits.roll_size` has no unit
 --> sample.toml:7:13
  |
7 | roll_size = 64
  |             ^^ bytes, KiB, MiB?
  |
  = help: write "64 B" if bytes are meant, else as in "64 MiB"
  = help: the units are B, KiB, MiB, GiB, TiB (of 1,024) and kB, MB, GB, TB (of 1,000)

error: `limits.interval` is out of bounds
 --> sample.toml:8:12
  |
8 | interval = "10ms"
  |            ^^^^^^ 10ms is not within 50ms to 1m
  |
  = help: write a value from 50ms to 1m

error: `limits.depth` is out of bounds
 --> sample.toml:9:9
  |
9 | depth = 300
  |         ^^^ 300 is not within 1 to 256
  |
  = help: write a value from 1 to 256

error: unknown key `limits.nonsense`
  --> sample.toml:10:1
   |
10 | nonsense = 1
   | ^^^^^^^^ unknown
   |
   = help: the keys known here are `call_timeout`, `depth`, `interval`, `roll_size`

error: `host` is missing in `server`
  --> sample.toml:12:1
   |
12 | [[server]]
   | ^^^^^^^^^^ `host` belongs here
   |
   = help: write host = "web-1"

11 errors in sample.toml"#;
    assert_eq!(errors(text), expected);
}

#[test]
fn a_broken_relation_shows_both_sides() {
    let expected = r#"error: this must hold: limits.interval < limits.call_timeout
 --> sample.toml:3:12
  |
3 | interval = "30s"
  |            ^^^^^ `limits.interval` is 30s
  |
  = note: `limits.call_timeout` is 20s by default
  = help: make the interval shorter or the timeout longer

1 error in sample.toml"#;
    assert_eq!(errors("name = 'n'\n[limits]\ninterval = \"30s\"\n"), expected);
    let both = errors("name = 'n'\n[limits]\ninterval = '30s'\ncall_timeout = '30s'\n");
    assert!(both.contains("`limits.interval` is 30s") && both.contains("`limits.call_timeout` is 30s"), "{both}");
}

#[test]
fn a_relation_is_not_checked_with_a_value_that_is_wrong_anyway() {
    let text = errors("name = 'n'\n[limits]\ninterval = '59s'\ncall_timeout = 'never'\n");
    assert!(text.ends_with("1 error in sample.toml"), "{text}");
}

#[test]
fn zero_is_refused_unless_the_bounds_have_it() {
    let text = errors("name = 'n'\n[limits]\nroll_size = 0\n");
    assert!(text.contains("0 does not mean “unlimited”"), "{text}");
    let text = errors("name = 'n'\n[limits]\ncall_timeout = 0\n");
    assert!(text.contains("this must hold"), "0 itself is within the bounds: {text}");
}

#[test]
fn a_table_in_the_wrong_place_is_an_error_not_a_crash() {
    let text = errors("name = 'n'\nlimits = 3\nserver = [1]\n");
    assert!(text.contains("write [limits] on a line of its own"), "{text}");
    assert!(text.contains("write [[server]] on a line of its own"), "{text}");
    let text = errors("name = 'n'\n[server]\nhost = 'a'\n");
    assert!(text.contains("`server` must be a list of tables"), "{text}");
}

#[test]
fn syntax_errors_say_where() {
    let text = errors("name = \"n\"\nname = \"m\"\n[limits\n");
    assert!(text.contains("duplicate key") && text.contains("sample.toml:2:1"), "{text}");
    assert!(text.contains("sample.toml:3:8"), "{text}");
    let text = errors("");
    assert!(text.contains("`name` is missing") && text.contains("sample.toml:1:1"), "{text}");
    let text = errors("name = prod\n");
    assert!(text.contains("put the value between double quotes"), "{text}");
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let missing = dir.path().join("missing.toml");
    let text = read_text(&missing).expect_err("there is no file").to_string();
    assert!(text.contains("missing.toml") && text.contains("No such file"), "{text}");
    let latin1 = dir.path().join("latin1.toml");
    std::fs::write(&latin1, b"a = 1\nname = \"M\xfcller\"\n").expect("written");
    let text = read_text(&latin1).expect_err("not UTF-8").to_string();
    assert!(text.contains("line 2 is not UTF-8"), "{text}");
}
