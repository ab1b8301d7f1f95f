//! A stream's lines stand in a file in their order.

use super::*;

#[tokio::test]
async fn small_frames_that_are_kept_back_stay_before_what_follows_them() {
    let dir = tempdir();
    // Nothing is synced before its hour is sealed, so that all that decides is what is handed to the writer first.
    let root =
        Harness::start(dir.path(), LaneSettings { commit_interval: Duration::from_millis(500), ..settings(1024) });
    let log = Log::new(1, 1000, 0, 1);
    let (small, large) = (log.batch(0, 3), log.batch(3, 1000));
    assert!(small.batch.body.len() < 1024 && large.batch.body.len() > 1024, "one is kept back, one is not");
    root.ready().await;
    root.root.offer(vec![small, large]).await.expect("there is room");
    until(async || root.lines().len() >= 1000).await;
    let data = root.visible_files().into_iter().find(|file| file.extension().is_some_and(|e| e == "gz"));
    let lines: Vec<String> = gunzip(&data.expect("a file")).lines().map(str::to_owned).collect();
    assert_eq!(lines, log.lines());
}
