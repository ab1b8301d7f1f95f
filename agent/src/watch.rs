//! What the system tells of changes in directories. Hints only: whatever is not told, or lost on the way, the next scan
//! finds; it is found a little later then.
//!
//! | What happens | What is done |
//! |---|---|
//! | the system has no watches left, for all directories or for one | said once; scans alone find what changes there |
//! | the system's queue overflowed, or reading it failed | said, counted; a scan finds what was not told |
//! | more hints come than are taken | a scan takes their place |
//! | files come and go whose names no source has | nothing |

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use notify::event::{CreateKind, ModifyKind, RemoveKind, RenameMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};

/// Most paths that wait to be looked at. Where there are more, a scan is due anyway.
const MAX_HINTS: usize = 4096;

/// Most renamed files that are remembered, to follow them when they are renamed again.
const MAX_RENAMED: usize = 1024;

/// What was told since it was asked for last.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// Files that came, or were written to.
    pub paths: HashSet<PathBuf>,
    /// Files that once had a name that a source has, and were renamed: that name, and the last one, in the order in which
    /// it was told.
    pub renamed: Vec<(PathBuf, PathBuf)>,
    /// Whether more changed than files that grew.
    pub scan: bool,
    /// How often the system said that it could not tell all.
    pub overflows: u64,
}

/// Makes hints of what the system tells. Pure.
struct Interpreter<F> {
    /// Whether a source has the name.
    matches: F,
    watched: BTreeSet<PathBuf>,
    /// The last names of files that were renamed, and the name by which they were found, or would have been.
    renamed: HashMap<PathBuf, PathBuf>,
    hints: Hints,
}

impl<F: Fn(&Path) -> bool> Interpreter<F> {
    fn new(matches: F) -> Self {
        Self { matches, watched: BTreeSet::new(), renamed: HashMap::new(), hints: Hints::default() }
    }

    /// Returns whether there is anything to be taken.
    fn tell(&mut self, event: notify::Result<notify::Event>, is_directory: impl Fn(&Path) -> bool) -> bool {
        let event = match event {
            Ok(event) if event.need_rescan() => return self.overflow(),
            Ok(event) => event,
            Err(_) => return self.overflow(),
        };
        let of_interest = event.paths.iter().any(|path| (self.matches)(path));
        match (event.kind, &event.paths[..]) {
            (EventKind::Access(_), _) => return false,
            (EventKind::Create(CreateKind::Folder) | EventKind::Remove(RemoveKind::Folder | RemoveKind::Other), _) => {
                self.hints.scan = true;
            }
            (EventKind::Modify(ModifyKind::Name(RenameMode::Both)), [from, to]) => return self.renamed(from, to),
            // A directory that comes or goes takes the files in it along.
            (EventKind::Modify(ModifyKind::Name(_)), [path])
                if of_interest || self.watched.contains(path) || is_directory(path) =>
            {
                self.hints.scan = true;
            }
            (EventKind::Remove(_), _) if of_interest => self.hints.scan = true,
            (EventKind::Create(_) | EventKind::Modify(ModifyKind::Data(_) | ModifyKind::Metadata(_)), _)
                if of_interest =>
            {
                if self.hints.paths.len() + event.paths.len() > MAX_HINTS {
                    self.hints.scan = true;
                } else {
                    self.hints.paths.extend(event.paths);
                }
            }
            (EventKind::Any | EventKind::Other | EventKind::Modify(ModifyKind::Any | ModifyKind::Other), _) => {
                self.hints.scan = true;
            }
            _ => return false,
        }
        true
    }

    fn overflow(&mut self) -> bool {
        self.hints.overflows += 1;
        self.hints.scan = true;
        true
    }

    fn renamed(&mut self, from: &Path, to: &Path) -> bool {
        let first = match self.renamed.remove(from) {
            Some(first) => first,
            None if (self.matches)(from) => from.to_owned(),
            // One that comes under a name that a source has was told of as such.
            None => return (self.matches)(to),
        };
        if self.renamed.len() < MAX_RENAMED && self.hints.renamed.len() < MAX_HINTS {
            self.renamed.insert(to.to_owned(), first.clone());
            self.hints.renamed.push((first, to.to_owned()));
        }
        true
    }
}

/// What tells of changes: the system, or a test in its place.
trait Watches: Send + std::fmt::Debug {
    fn watch(&mut self, directory: &Path) -> notify::Result<()>;
    fn unwatch(&mut self, directory: &Path) -> notify::Result<()>;
}

impl Watches for RecommendedWatcher {
    fn watch(&mut self, directory: &Path) -> notify::Result<()> {
        Watcher::watch(self, directory, RecursiveMode::NonRecursive)
    }

    fn unwatch(&mut self, directory: &Path) -> notify::Result<()> {
        Watcher::unwatch(self, directory)
    }
}

/// Watches directories. Without it, all is found as well, only later.
#[derive(Debug)]
pub struct DirectoryWatcher {
    watches: Option<Box<dyn Watches>>,
    hints: Arc<dyn TakeHints>,
    watched: BTreeSet<PathBuf>,
    /// Directories that can't be watched, of which that was said.
    refused: BTreeSet<PathBuf>,
}

trait TakeHints: Send + Sync + std::fmt::Debug {
    fn take(&self) -> Hints;
    fn are_watched(&self, directories: BTreeSet<PathBuf>);
}

/// What the thread that hears of changes, and the one that asks for them, share.
struct Shared<F, W> {
    interpreter: Mutex<Interpreter<F>>,
    waiting: AtomicBool,
    wake: W,
}

impl<F, W> std::fmt::Debug for Shared<F, W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("waiting", &self.waiting).finish_non_exhaustive()
    }
}

impl<F: Fn(&Path) -> bool + Send, W: Fn() + Send + Sync> Shared<F, W> {
    fn tell(&self, event: notify::Result<notify::Event>) {
        let told = self.interpreter.lock().unwrap_or_else(PoisonError::into_inner).tell(event, Path::is_dir);
        if told && !self.waiting.swap(true, Ordering::AcqRel) {
            (self.wake)();
        }
    }
}

impl<F: Fn(&Path) -> bool + Send, W: Fn() + Send + Sync> TakeHints for Shared<F, W> {
    fn take(&self) -> Hints {
        self.waiting.store(false, Ordering::Release);
        std::mem::take(&mut self.interpreter.lock().unwrap_or_else(PoisonError::into_inner).hints)
    }

    fn are_watched(&self, directories: BTreeSet<PathBuf>) {
        self.interpreter.lock().unwrap_or_else(PoisonError::into_inner).watched = directories;
    }
}

impl DirectoryWatcher {
    /// A watcher that calls `wake` when there are hints to take. `matches`: whether a file of that name is of interest.
    /// `enabled`: whether the system is to be asked at all.
    pub fn new(
        enabled: bool,
        matches: impl Fn(&Path) -> bool + Send + 'static,
        wake: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        let shared = Arc::new(Shared {
            interpreter: Mutex::new(Interpreter::new(matches)),
            waiting: AtomicBool::new(false),
            wake,
        });
        let watches = enabled.then(|| {
            let shared = Arc::clone(&shared);
            notify::recommended_watcher(move |event: notify::Result<notify::Event>| shared.tell(event))
        });
        let watches = watches.transpose().unwrap_or_else(|error| {
            tracing::warn!(%error, "directories can't be watched: changes are found by scans alone, a little later");
            None
        });
        Self::with(watches.map(|watches| Box::new(watches) as Box<dyn Watches>), shared)
    }

    fn with(watches: Option<Box<dyn Watches>>, hints: Arc<dyn TakeHints>) -> Self {
        Self { watches, hints, watched: BTreeSet::new(), refused: BTreeSet::new() }
    }

    /// What was told since this was called last.
    #[must_use]
    pub fn take_hints(&self) -> Hints {
        self.hints.take()
    }

    /// Directories in which changes are found by scans alone, since the system refuses to watch them.
    #[must_use]
    pub fn refused(&self) -> usize {
        self.refused.len()
    }

    /// Watches these directories and no others.
    pub fn watch(&mut self, directories: &BTreeSet<PathBuf>) {
        let Some(watches) = &mut self.watches else { return };
        for gone in self.watched.difference(directories) {
            // It fails where the directory is gone, and with it the watch.
            let _ = watches.unwatch(gone);
        }
        let before = std::mem::take(&mut self.watched);
        self.refused.retain(|directory| directories.contains(directory));
        let mut refused = Vec::new();
        for directory in directories {
            if before.contains(directory) {
                self.watched.insert(directory.clone());
                continue;
            }
            match watches.watch(directory) {
                Ok(()) => {
                    self.refused.remove(directory);
                    self.watched.insert(directory.clone());
                }
                Err(error) => {
                    if self.refused.insert(directory.clone()) {
                        refused.push((directory, error));
                    }
                }
            }
        }
        if before != self.watched {
            self.hints.are_watched(self.watched.clone());
        }
        if let Some((directory, error)) = refused.first() {
            tracing::warn!(
                directory = %directory.display(), %error, directories = refused.len(),
                "directories can't be watched: changes in them are found by scans alone, a little later; \
                 where it is for a limit, raise fs.inotify.max_user_watches"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use notify::event::{DataChange, Flag};
    use notify::{Event, EventKind as Kind};

    fn interpreter() -> Interpreter<impl Fn(&Path) -> bool> {
        Interpreter::new(|path: &Path| path.extension().is_some_and(|extension| extension == "log"))
    }

    fn hear(interpreter: &mut Interpreter<impl Fn(&Path) -> bool>, event: notify::Result<Event>) -> bool {
        interpreter.tell(event, |path| path.ends_with("directory"))
    }

    fn event(kind: Kind, paths: &[&str]) -> notify::Result<Event> {
        Ok(paths.iter().fold(Event::new(kind), |event, path| event.add_path(path.into())))
    }

    const WRITTEN: Kind = Kind::Modify(ModifyKind::Data(DataChange::Any));
    const RENAMED: Kind = Kind::Modify(ModifyKind::Name(RenameMode::Both));

    #[test]
    fn a_file_that_is_written_to_is_named_and_foreign_ones_are_not() {
        let mut interpreter = interpreter();
        for foreign in [Kind::Create(CreateKind::File), WRITTEN, Kind::Remove(RemoveKind::File)] {
            assert!(!hear(&mut interpreter, event(foreign, &["/d/x.tmp"])), "{foreign:?}");
        }
        assert!(hear(&mut interpreter, event(WRITTEN, &["/d/a.log"])));
        let wanted = Hints { paths: HashSet::from(["/d/a.log".into()]), ..Hints::default() };
        assert_eq!(interpreter.hints, wanted);
    }

    #[test]
    fn an_overflow_of_the_queue_and_too_many_hints_make_a_scan() {
        let mut full = interpreter();
        assert!(hear(&mut full, Ok(Event::new(Kind::Other).set_flag(Flag::Rescan))));
        assert_eq!(full.hints, Hints { scan: true, overflows: 1, ..Hints::default() });
        let mut many = interpreter();
        for n in 0..=MAX_HINTS {
            hear(&mut many, event(WRITTEN, &[&format!("/d/{n}.log")]));
        }
        assert!(many.hints.scan && many.hints.paths.len() == MAX_HINTS);
    }

    #[test]
    fn a_file_is_followed_through_several_names() {
        let mut interpreter = interpreter();
        assert!(!hear(&mut interpreter, event(RENAMED, &["/d/x.tmp", "/d/y.tmp"])));
        assert!(hear(&mut interpreter, event(RENAMED, &["/d/a.log", "/d/a.1"])));
        assert!(hear(&mut interpreter, event(RENAMED, &["/d/a.1", "/d/a.2"])));
        let names = |to: &str| (PathBuf::from("/d/a.log"), PathBuf::from(to));
        assert_eq!(interpreter.hints.renamed, [names("/d/a.1"), names("/d/a.2")]);
    }

    #[test]
    fn a_directory_that_comes_or_goes_makes_a_scan_and_a_foreign_file_does_not() {
        let moved = |mode| Kind::Modify(ModifyKind::Name(mode));
        let mut interpreter = interpreter();
        interpreter.watched.insert("/d/watched".into());
        assert!(!hear(&mut interpreter, event(moved(RenameMode::To), &["/d/file"])));
        assert!(!hear(&mut interpreter, event(moved(RenameMode::From), &["/d/file"])));
        assert!(hear(&mut interpreter, event(moved(RenameMode::To), &["/d/directory"])));
        assert!(hear(&mut interpreter, event(moved(RenameMode::From), &["/d/watched"])));
        assert!(interpreter.hints.scan);
    }

    #[derive(Debug)]
    struct Limited(usize, Arc<Mutex<Vec<PathBuf>>>);

    impl Watches for Limited {
        fn watch(&mut self, directory: &Path) -> notify::Result<()> {
            let mut watched = self.1.lock().expect("no panic");
            if watched.len() == self.0 {
                return Err(notify::Error::new(notify::ErrorKind::MaxFilesWatch));
            }
            watched.push(directory.to_owned());
            Ok(())
        }

        fn unwatch(&mut self, directory: &Path) -> notify::Result<()> {
            self.1.lock().expect("no panic").retain(|watched| watched != directory);
            Ok(())
        }
    }

    #[test]
    fn what_the_system_refuses_to_watch_is_tried_again() {
        let watched = Arc::new(Mutex::new(Vec::new()));
        let none =
            Arc::new(Shared { interpreter: Mutex::new(interpreter()), waiting: AtomicBool::new(false), wake: || {} });
        let mut watcher = DirectoryWatcher::with(Some(Box::new(Limited(1, Arc::clone(&watched)))), none);
        let directories = |names: &[&str]| names.iter().map(PathBuf::from).collect::<BTreeSet<_>>();
        watcher.watch(&directories(&["/a", "/b"]));
        assert_eq!((watched.lock().expect("no panic").clone(), watcher.refused()), (vec!["/a".into()], 1));
        watcher.watch(&directories(&["/b"]));
        assert_eq!((watched.lock().expect("no panic").clone(), watcher.refused()), (vec!["/b".into()], 0));
    }

    #[test]
    fn a_new_file_in_a_watched_directory_is_hinted_at() {
        let tree = tempfile::tempdir().expect("a directory");
        let (sender, woken) = std::sync::mpsc::channel();
        let matches = |path: &Path| path.extension().is_some_and(|extension| extension == "log");
        let mut watcher = DirectoryWatcher::new(true, matches, move || {
            let _ = sender.send(());
        });
        watcher.watch(&BTreeSet::from([tree.path().to_owned()]));
        let file = tree.path().join("b.log");
        std::fs::write(&file, "b").expect("written");
        woken.recv_timeout(std::time::Duration::from_secs(30)).expect("a hint");
        assert!(watcher.take_hints().paths.contains(&file));
    }
}
