//! File systems that don't tell when a file was made, or don't tell of changes, or hold a file twice.

use std::os::fd::AsFd;

use rustix::fs::{AtFlags, StatxFlags, statx};

use crate::machine::Disk;
use crate::support::{Scene, append, lines};

/// Rotation, truncation and restarts, with and without the database.
async fn live_through_a_day(scene: &Scene) {
    let log = scene.log("a.log");
    append(&log, &lines(0..500));
    let agent = scene.start();
    scene.expect_lines(&lines(0..500)).await;
    append(&log, &lines(500..600));
    std::fs::rename(&log, scene.log("a.log.1")).expect("renamed");
    append(&log, &lines(600..700));
    append(&scene.log("new.log"), &lines(700..710));
    scene.expect_lines(&lines(0..710)).await;
    agent.stop().await;
    append(&log, &lines(710..720));
    std::fs::rename(&log, scene.log("a.log.2")).expect("renamed");
    append(&log, &lines(720..730));
    scene.once().await.expect("all is shipped");
    scene.expect_lines(&lines(0..730)).await;
    std::fs::remove_dir_all(scene.data_dir()).expect("removed");
    let agent = scene.start();
    append(&log, &lines(730..740));
    scene.expect_lines(&lines(0..740)).await;
    // The inode numbers of those that are gone are used again.
    for name in ["new.log", "a.log.1", "a.log.2"] {
        std::fs::remove_file(scene.log(name)).expect("removed");
    }
    append(&scene.log("newer.log"), &lines(740..750));
    std::fs::write(&log, "").expect("truncated");
    append(&log, &lines(750..900));
    scene.expect_lines(&lines(0..900)).await;
    agent.stop().await;
    scene.once().await.expect("all is shipped");
    scene.expect_lines(&lines(0..900)).await;
}

#[tokio::test]
async fn a_file_system_in_memory_is_one_like_any_other() {
    for watch in [true, false] {
        let mut scene = Scene::new(1).await;
        scene.settings = format!("watch = {watch}");
        let Some(_disk) = Disk::in_memory(scene.log(""), "64m") else { return };
        live_through_a_day(&scene).await;
    }
}

#[tokio::test]
async fn where_no_file_has_a_birth_time_all_is_found_and_nothing_is_shipped_twice() {
    for watch in [true, false] {
        let mut scene = Scene::new(1).await;
        scene.settings = format!("watch = {watch}");
        let Some(_disk) = Disk::mount(scene.log(""), "ramfs", "mode=755") else { return };
        append(&scene.log("probe"), &lines(0..1));
        let file = std::fs::File::open(scene.log("probe")).expect("opens");
        let facts = statx(file.as_fd(), "", AtFlags::EMPTY_PATH, StatxFlags::BTIME).expect("statx");
        if StatxFlags::from_bits_retain(facts.stx_mask).contains(StatxFlags::BTIME) {
            return eprintln!(
                "SKIPPED: this kernel's ramfs has birth times, and this test needs a file system without"
            );
        }
        live_through_a_day(&scene).await;
    }
}

#[tokio::test]
async fn a_file_of_a_lower_layer_is_followed_into_the_upper_one() {
    let scene = Scene::new(1).await;
    let [lower, upper, work] = ["lower", "upper", "work"].map(|name| scene.dir().join("overlay").join(name));
    // An overlay can't have its upper layer on another one.
    std::fs::create_dir(scene.dir().join("overlay")).expect("made");
    let Some(_layers) = Disk::in_memory(scene.dir().join("overlay"), "64m") else { return };
    for directory in [&lower, &upper, &work] {
        std::fs::create_dir(directory).expect("made");
    }
    append(&lower.join("a.log"), &lines(0..100));
    let options = format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
    let Some(_disk) = Disk::mount(scene.log(""), "overlay", &options) else { return };
    let agent = scene.start();
    scene.expect_lines(&lines(0..100)).await;
    // It is copied to the upper layer now; the agent has the one of the lower layer open.
    append(&scene.log("a.log"), &lines(100..200));
    scene.expect_lines(&lines(0..200)).await;
    append(&scene.log("a.log"), &lines(200..300));
    scene.expect_lines(&lines(0..300)).await;
    agent.stop().await;
    append(&scene.log("a.log"), &lines(300..310));
    scene.once().await.expect("all is shipped");
    scene.expect_lines(&lines(0..310)).await;
}
