//! Whatever becomes of the agent's database: shipping goes on, nothing is lost or doubled, the operator is told, and
//! when the trouble is over, all is as before.

use rusqlite::Connection;

use crate::machine::Disk;
use crate::support::{Scene, append, lines, wait_for};

/// Offsets that the database says to be committed.
fn committed(scene: &Scene) -> Vec<i64> {
    let Ok(database) = Connection::open(scene.data_dir().join("checkpoints.db")) else { return Vec::new() };
    let Ok(mut rows) = database.prepare("SELECT committed FROM streams") else { return Vec::new() };
    rows.query_map([], |row| row.get(0)).and_then(Iterator::collect).unwrap_or_default()
}

async fn expect_committed(scene: &Scene) {
    let size = std::fs::metadata(scene.log("a.log")).expect("a file").len().cast_signed();
    wait_for(|| committed(scene) == [size], || format!("{:?} and not {size} is in the database", committed(scene)))
        .await;
}

/// The trouble is told, and lines go on to be shipped meanwhile. Returns the next number of a line.
async fn ships_in_trouble(scene: &Scene, word: &str, from: u32) -> u32 {
    append(&scene.log("a.log"), &lines(from..from + 100));
    scene.answer("/readyz", |text| text.contains("checkpoints can't be written") && text.contains(word)).await;
    let metrics = scene.ask("/metrics").await;
    assert!(metrics.contains("tributary_agent_checkpoints_failing 1"), "{metrics}");
    assert!(!metrics.contains("tributary_agent_checkpoint_errors_total 0"), "{metrics}");
    append(&scene.log("a.log"), &lines(from + 100..from + 200));
    scene.expect_lines(&lines(0..from + 200)).await;
    from + 200
}

#[tokio::test]
async fn a_database_that_is_lost_while_in_use_is_written_anew() {
    let scene = Scene::new(1).await.answers_operators();
    append(&scene.log("a.log"), &lines(0..1000));
    let agent = scene.start();
    scene.expect_lines(&lines(0..1000)).await;
    expect_committed(&scene).await;
    std::fs::remove_dir_all(scene.data_dir()).expect("removed");
    append(&scene.log("a.log"), &lines(1000..1100));
    scene.expect_lines(&lines(0..1100)).await;
    expect_committed(&scene).await;
    scene.ready().await;
    agent.stop().await;
}

#[tokio::test]
async fn a_database_that_becomes_corrupt_while_in_use_costs_nothing() {
    use std::os::unix::fs::FileExt;
    let scene = Scene::new(1).await;
    for round in 0..4_u32 {
        append(&scene.log("a.log"), &lines(round * 200..round * 200 + 100));
        let agent = scene.start();
        scene.expect_lines(&lines(0..round * 200 + 100)).await;
        expect_committed(&scene).await;
        // What SQLite holds in memory may hide this until it is opened again.
        let name = if round % 2 == 0 { "checkpoints.db-wal" } else { "checkpoints.db" };
        let file = std::fs::OpenOptions::new().write(true).open(scene.data_dir().join(name)).expect("opens");
        file.write_all_at(&vec![0x5a; file.metadata().expect("metadata").len() as usize], 0).expect("written");
        append(&scene.log("a.log"), &lines(round * 200 + 100..round * 200 + 200));
        scene.expect_lines(&lines(0..round * 200 + 200)).await;
        agent.stop().await;
    }
    scene.once().await.expect("nothing is left");
    scene.expect_lines(&lines(0..800)).await;
}

#[tokio::test]
async fn a_database_of_a_newer_version_is_set_aside() {
    let scene = Scene::new(1).await.answers_operators();
    append(&scene.log("a.log"), &lines(0..1000));
    scene.once().await.expect("shipped");
    let database = Connection::open(scene.data_dir().join("checkpoints.db")).expect("opens");
    database.pragma_update(None, "user_version", 99).expect("updated");
    drop(database);
    append(&scene.log("a.log"), &lines(1000..1100));
    let agent = scene.start();
    scene.expect_lines(&lines(0..1100)).await;
    expect_committed(&scene).await;
    scene.ready().await;
    agent.stop().await;
    assert!(scene.data_dir().join("checkpoints.db.corrupt-1").exists());
}

#[tokio::test]
async fn a_database_that_another_process_has_locked_is_waited_for() {
    let scene = Scene::new(1).await.answers_operators();
    append(&scene.log("a.log"), &lines(0..1000));
    scene.once().await.expect("shipped");
    let other = Connection::open(scene.data_dir().join("checkpoints.db")).expect("opens");
    // So that not even reading is possible, as in a restore.
    other.pragma_update(None, "locking_mode", "EXCLUSIVE").expect("updated");
    other.execute_batch("BEGIN IMMEDIATE").expect("locked");
    append(&scene.log("a.log"), &lines(1000..1100));
    let agent = scene.start();
    let next = ships_in_trouble(&scene, "locked", 1100).await;
    drop(other);
    scene.ready().await;
    expect_committed(&scene).await;
    let other = Connection::open(scene.data_dir().join("checkpoints.db")).expect("opens");
    other.execute_batch("BEGIN IMMEDIATE").expect("locked");
    ships_in_trouble(&scene, "locked", next).await;
    drop(other);
    scene.ready().await;
    expect_committed(&scene).await;
    agent.stop().await;
    assert!(!scene.data_dir().join("checkpoints.db.corrupt-1").exists());
}

#[tokio::test]
async fn a_disk_that_is_read_only_is_waited_for() {
    let mut scene = Scene::new(1).await.answers_operators();
    let Some(disk) = Disk::in_memory(scene.dir().join("disk"), "4m") else { return };
    scene.data_dir = Some(disk.path().join("data"));
    append(&scene.log("a.log"), &lines(0..1000));
    scene.once().await.expect("shipped");
    disk.writable(false);
    append(&scene.log("a.log"), &lines(1000..1100));
    let agent = scene.start();
    ships_in_trouble(&scene, "Read-only file system", 1100).await;
    let taken = scene.once().await.expect_err("another agent runs there");
    assert!(taken.contains("another agent runs"), "{taken}");
    disk.writable(true);
    scene.ready().await;
    expect_committed(&scene).await;
    agent.stop().await;
    assert!(!scene.data_dir().join("checkpoints.db.corrupt-1").exists());
}

#[tokio::test]
async fn a_disk_that_is_full_is_waited_for() {
    let mut scene = Scene::new(1).await.answers_operators();
    let Some(disk) = Disk::in_memory(scene.dir().join("disk"), "1m") else { return };
    scene.data_dir = Some(disk.path().join("data"));
    let ballast = disk.path().join("ballast");
    let fill = || {
        use std::io::Write;
        let mut file = std::fs::File::create(&ballast).expect("made");
        while file.write_all(&[0; 4096]).is_ok() {}
        while file.write_all(&[0]).is_ok() {}
    };
    fill();
    append(&scene.log("a.log"), &lines(0..1000));
    let agent = scene.start();
    let next = ships_in_trouble(&scene, "full", 1000).await;
    std::fs::remove_file(&ballast).expect("removed");
    scene.ready().await;
    expect_committed(&scene).await;
    fill();
    // The log that SQLite writes ahead has room for some more.
    let mut from = next;
    while !scene.ask("/readyz").await.contains("full") {
        append(&scene.log("a.log"), &lines(from..from + 1));
        from += 1;
        assert!(from < next + 100_000, "the disk is not full");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    ships_in_trouble(&scene, "full", from).await;
    std::fs::remove_file(&ballast).expect("removed");
    scene.ready().await;
    expect_committed(&scene).await;
    agent.stop().await;
    assert!(!scene.data_dir().join("checkpoints.db.corrupt-1").exists());
}

#[tokio::test]
async fn a_second_agent_with_the_same_data_directory_is_refused() {
    let scene = Scene::new(1).await.answers_operators();
    append(&scene.log("a.log"), &lines(0..10));
    let agent = scene.start();
    scene.expect_lines(&lines(0..10)).await;
    let error = scene.once().await.expect_err("refused");
    assert!(error.contains("another agent runs with data_dir"), "{error}");
    agent.stop().await;
    scene.once().await.expect("the place is free");
}
