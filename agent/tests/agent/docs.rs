//! The README's table of files and how they are treated.

use std::path::Path;

#[test]
fn the_tests_that_the_readme_names_exist() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = std::fs::read_to_string(folder.join("../README.md")).expect("read");
    let (_, section) = readme.split_once("## Files and how they are treated").expect("it has the section");
    let sources = std::fs::read_dir(folder.join("tests/agent")).expect("read").flatten();
    let sources: String = sources.map(|file| std::fs::read_to_string(file.path()).expect("read")).collect();
    let mut named = 0;
    for row in section.lines().skip_while(|line| !line.starts_with('|')).take_while(|line| line.starts_with('|')) {
        let tests = row.trim_end_matches('|').rsplit('|').next().unwrap_or_default();
        for test in tests.split('`').skip(1).step_by(2) {
            assert!(sources.contains(&format!("fn {test}(")), "there is no test {test}");
            named += 1;
        }
    }
    assert!(named > 40, "{named} tests are named");
}
