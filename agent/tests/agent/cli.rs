//! What the program says, and with which exit code: `run --once`, `status`, `explain`.

use http::StatusCode;
use serde_json::Value;

use crate::support::{Scene, append, lines};

#[tokio::test]
async fn once_ends_with_0_when_all_is_committed() {
    let scene = Scene::new(1).await;
    append(&scene.log("a.log"), &lines(0..1000));
    let (code, _, errors) = scene.cli(&["run", "--once"]).await;
    assert_eq!(code, Some(0), "{errors}");
    scene.expect_lines(&lines(0..1000)).await;
}

#[tokio::test]
async fn once_ends_with_1_when_nothing_gets_committed_for_too_long() {
    let scene = Scene::new(1).await;
    append(&scene.log("a.log"), &lines(0..1000));
    scene.edges[0].fail(Some(StatusCode::SERVICE_UNAVAILABLE));
    let (code, _, errors) = scene.cli(&["run", "--once", "--give-up-after", "1s"]).await;
    assert_eq!(code, Some(1), "{errors}");
    let last = errors.lines().last().unwrap_or_default();
    assert!(last.contains("nothing was committed for 1s") && last.contains("is busy"), "{last}");
    // It is up, and takes all, and the root behind it is not.
    scene.edges[0].fail(None);
    scene.root().committing = false;
    let (code, _, errors) = scene.cli(&["run", "--once", "--give-up-after", "1s"]).await;
    let bytes: usize = lines(0..1000).iter().map(|line| line.len() + 1).sum();
    assert_eq!(code, Some(1), "{errors}");
    let last = errors.lines().last().unwrap_or_default();
    assert!(
        last.contains(&format!("{bytes} bytes are not")) && last.contains("will be shipped by the next run"),
        "{last}"
    );
    scene.root().committing = true;
    let (code, _, errors) = scene.cli(&["run", "--once"]).await;
    assert_eq!(code, Some(0), "{errors}");
    scene.expect_lines(&lines(0..1000)).await;
}

#[tokio::test]
async fn once_ships_the_others_and_ends_with_1_when_a_file_can_not_be_shipped() {
    let scene = Scene::new(1).await;
    append(&scene.log("a.log"), &lines(0..1000));
    let utf16: Vec<u8> = "\u{feff}wide\n".encode_utf16().flat_map(u16::to_le_bytes).collect();
    std::fs::write(scene.log("wide.log"), utf16).expect("written");
    let (code, _, errors) = scene.cli(&["run", "--once"]).await;
    assert_eq!(code, Some(1), "{errors}");
    let last = errors.lines().last().unwrap_or_default();
    let parts = ["1 files can't be shipped", "wide.log", "UTF-16", "iconv -f UTF-16 -t UTF-8"];
    assert!(parts.iter().all(|part| last.contains(part)), "{last}");
    scene.expect_lines(&lines(0..1000)).await;
}

#[tokio::test]
async fn once_ends_with_1_when_a_file_or_a_directory_can_not_be_read() {
    use std::os::unix::fs::PermissionsExt;
    const NOBODY: u32 = 65_534;
    let mut scene = Scene::new(1).await;
    if std::os::unix::fs::chown(scene.dir(), Some(NOBODY), None).is_err() {
        return eprintln!("SKIPPED: this test runs an agent as another user, which takes root");
    }
    scene.include = "**/*.log";
    append(&scene.log("a.log"), &lines(0..10));
    std::fs::create_dir(scene.log("secret")).expect("made");
    append(&scene.log("secret/b.log"), &lines(10..20));
    for secret in [scene.log("secret/b.log"), scene.log("secret")] {
        std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o600)).expect("changed");
        let mut agent = scene.spawn(&[], &["--once"], Some(NOBODY));
        assert_eq!(agent.ended().await, Some(1), "{}", agent.log());
        let log = agent.log();
        let last = log.lines().last().unwrap_or_default();
        assert!(last.contains("1 files can't be shipped") && last.contains("Permission denied"), "{last}");
    }
    scene.expect_lines(&lines(0..10)).await;
    for secret in [scene.log("secret"), scene.log("secret/b.log")] {
        std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o755)).expect("changed");
    }
    let mut agent = scene.spawn(&[], &["--once"], Some(NOBODY));
    assert_eq!(agent.ended().await, Some(0), "{}", agent.log());
    scene.expect_lines(&lines(0..20)).await;
}

#[tokio::test]
async fn status_shows_how_far_each_stream_is_and_why_it_waits() {
    let scene = Scene::new(1).await.answers_operators();
    scene.root().committing = false;
    append(&scene.log("a.log"), &lines(0..100));
    append(&scene.log("gone.log"), &lines(100..200));
    std::fs::write(scene.log("half.log"), "whole\nhalf").expect("written");
    std::fs::write(scene.log("wide.log"), b"\xff\xfea\0\n\0").expect("written");
    let agent = scene.start();
    scene.expect_lines(&[lines(0..200), vec!["whole".into()]].concat()).await;
    std::fs::remove_file(scene.log("gone.log")).expect("removed");
    let file = |status: &Value, name: &str| {
        let files = status["files"].as_array().cloned().unwrap_or_default();
        files.into_iter().find(|file| file["path"].as_str().is_some_and(|path| path.ends_with(name)))
    };
    // Held since it was deleted, and waiting for at least a second.
    let told = scene
        .answer("/status", |text| {
            let status: Value = serde_json::from_str(text).unwrap_or_default();
            let held = file(&status, "gone.log").is_some_and(|file| file["held"].as_u64() > Some(0));
            held && file(&status, "a.log").is_some_and(|file| file["lag_seconds"].as_u64() > Some(0))
        })
        .await;
    let status: Value = serde_json::from_str(&told).expect("JSON");
    let size: usize = lines(0..100).iter().map(|line| line.len() + 1).sum();
    let a = file(&status, "a.log").expect("there");
    let numbers = ["size", "read", "next", "committed", "lag", "held"].map(|key| a[key].as_u64());
    assert_eq!(numbers, [size, size, size, 0, size, 0].map(|number| Some(number as u64)));
    assert_eq!(a["waiting"], "upstream has it, and has not said that it is durable");
    assert_eq!(file(&status, "half.log").expect("there")["waiting"], "its last line has no end yet");
    let gone = file(&status, "gone.log").expect("there");
    assert_eq!((&gone["held"], &gone["deleted"]), (&gone["size"], &Value::Bool(true)));
    assert_eq!(status["held_bytes"], gone["size"]);
    assert!(status["unshipped"][0]["reason"].as_str().expect("a text").contains("UTF-16"), "{status}");

    let (code, text, errors) = scene.cli(&["status"]).await;
    assert_eq!(code, Some(0), "{errors}");
    for part in ["gone.log (deleted)", "waits: its last line has no end yet", "wide.log (not shipped)", "held"] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    let (code, json, _) = scene.cli(&["status", "--json"]).await;
    assert_eq!(code, Some(0));
    let json: Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(json["held_bytes"], gone["size"]);
    agent.stop().await;
    let (code, _, errors) = scene.cli(&["status"]).await;
    assert!(code == Some(1) && errors.contains("is it running with this configuration?"), "{errors}");
}

#[tokio::test]
async fn explain_says_whether_where_and_why() {
    let mut scene = Scene::new(1).await;
    scene.source = "exclude = [\"/**/debug*.log\"]\n[source.timestamp]\nformat = \"%Y-%m-%dT%H:%M:%SZ\"\n".into();
    let text = "2026-11-22T20:15:31Z began\n2026-11-22T21:00:00Z went on\n\tat a stack trace\nhalf a line";
    std::fs::write(scene.log("a.log"), text).expect("written");
    std::fs::write(scene.log("debug.log"), text).expect("written");
    std::fs::write(scene.log("a.txt"), text).expect("written");
    std::fs::write(scene.log("wide.log"), b"\xff\xfea\0\n\0").expect("written");
    std::fs::write(scene.log("packed.log"), zstd::encode_all(text.as_bytes(), 1).expect("packed")).expect("written");
    std::fs::create_dir(scene.log("dir.log")).expect("made");
    let explain = async |name: &str| {
        let path = scene.log(name);
        let (code, text, errors) = scene.cli(&["explain", path.to_str().expect("a path")]).await;
        assert_eq!(errors, "");
        (code, text)
    };
    let (code, text) = explain("a.log").await;
    assert_eq!(code, Some(0), "{text}");
    for part in [
        "a.log: shipped as app\n",
        "source 1 (app) includes it by",
        "first line: \"2026-11-22T20:15:31Z began\"\n    bucket 2026-11-22T20:00:00Z, for its time is 2026-11-22T20:15:31Z: the line says it",
        "last line: \"\\tat a stack trace\"\n    bucket 2026-11-22T21:00:00Z, for its time is 2026-11-22T21:00:00Z: the line says none",
        "an hour is assumed",
    ] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    for (name, reason) in [
        ("debug.log", "and excludes it by \"/**/debug*.log\""),
        ("a.txt", "source 1 (app) does not include it"),
        ("wide.log", "it is UTF-16"),
        ("packed.log", "it is compressed (zstd)"),
        ("dir.log", "it is a directory"),
        ("missing.log", "there is no such file now"),
    ] {
        let (code, text) = explain(name).await;
        assert!(code == Some(1) && text.contains("not shipped") && text.contains(reason), "{name}: {text}");
    }
    let (code, json, _) = scene.cli(&["explain", "--json", scene.log("a.log").to_str().expect("a path")]).await;
    let json: Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!((code, &json["category"], &json["shipped"]), (Some(0), &"app".into(), &true.into()));
    assert_eq!(json["lines"][1]["bucket"], "2026-11-22T21:00:00Z");
}

#[tokio::test]
async fn explain_says_why_an_old_file_is_left_alone() {
    let mut scene = Scene::new(1).await;
    scene.source = "ignore_older = \"1d\"".into();
    append(&scene.log("a.log"), &lines(0..3));
    let file = std::fs::File::options().append(true).open(scene.log("a.log")).expect("opens");
    let week_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(7 * 86_400);
    file.set_modified(week_ago).expect("set");
    let (code, text, _) = scene.cli(&["explain", scene.log("a.log").to_str().expect("a path")]).await;
    assert!(code == Some(1) && text.contains("longer than ignore_older = \"1d\""), "{text}");
}
