//! What was wrong with a configuration, and how it is shown.

use std::cell::RefCell;
use std::fmt;
use std::ops::Range;

use annotate_snippets::{AnnotationKind, Group, Level, Origin, Renderer, Snippet};

/// Proof that an error was reported. Only a report makes one, so a function that returns it can't fail silently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub struct Reported(());

impl Reported {
    /// For a field whose place says that it was reported.
    pub(super) fn before() -> Self {
        Self(())
    }
}

/// What is wrong with one value and what to write instead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Complaint {
    title: String,
    label: Option<String>,
    help: Vec<String>,
}

impl Complaint {
    /// A complaint with its one-line summary.
    pub fn new(title: impl Into<String>) -> Self {
        Self { title: title.into(), label: None, help: Vec::new() }
    }

    /// Adds the words that stand under the marked text.
    #[must_use]
    pub fn label(mut self, label: impl Into<String>) -> Self {
        self.label = Some(label.into());
        self
    }

    /// Adds a line that says what to write instead.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help.push(help.into());
        self
    }
}

/// Where a field's value comes from.
#[derive(Debug, Clone)]
pub struct Place {
    pub(super) key: String,
    pub(super) shown: String,
    /// None: not written, the default.
    pub(super) span: Option<Range<usize>>,
    /// False: what is written was reported, and the value is a stand-in.
    pub(super) valid: bool,
}

impl Place {
    /// The key with the tables that it is in, such as `root.roll_size`.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Whether the file says it, rightly or wrongly.
    #[must_use]
    pub fn is_written(&self) -> bool {
        self.span.is_some()
    }

    /// Whether the value is the file's (or the default) and not a stand-in for something that was reported.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        self.valid
    }
}

/// One complaint with the places that it is about.
#[derive(Debug, Clone)]
pub(super) struct Problem {
    complaint: Complaint,
    /// The first one is where the problem is said to be.
    marks: Vec<(Range<usize>, Option<String>)>,
    notes: Vec<String>,
}

impl Problem {
    pub(super) fn at(span: Option<Range<usize>>, complaint: Complaint) -> Self {
        let label = complaint.label.clone();
        Self { complaint, marks: span.map(|span| (span, label)).into_iter().collect(), notes: Vec::new() }
    }

    /// A problem of several fields with each other.
    pub(super) fn between(places: &[&Place], complaint: Complaint) -> Self {
        let marks = places
            .iter()
            .filter_map(|place| Some((place.span.clone()?, Some(format!("`{}` is {}", place.key, place.shown)))))
            .collect();
        let notes = places
            .iter()
            .filter(|place| place.span.is_none())
            .map(|place| format!("`{}` is {} by default", place.key, place.shown))
            .collect();
        Self { complaint, marks, notes }
    }

    fn start(&self) -> usize {
        self.marks.first().map_or(0, |(span, _)| span.start)
    }

    fn group<'a>(&'a self, name: &'a str, text: &'a str) -> Group<'a> {
        let title = Level::ERROR.primary_title(self.complaint.title.as_str());
        let group = if self.marks.is_empty() {
            title.element(Origin::path(name))
        } else {
            let marks = self.marks.iter().enumerate().map(|(n, (span, label))| {
                let kind = if n == 0 { AnnotationKind::Primary } else { AnnotationKind::Context };
                kind.span(within(text, span)).label(label.as_deref())
            });
            title.element(Snippet::source(text).path(name).annotations(marks))
        };
        group
            .elements(self.notes.iter().map(|note| Level::NOTE.message(note.as_str())))
            .elements(self.complaint.help.iter().map(|help| Level::HELP.message(help.as_str())))
    }
}

/// The span, cut to the text and to its first line: a table written over many lines is marked at its head.
fn within(text: &str, span: &Range<usize>) -> Range<usize> {
    let start = span.start.min(text.len());
    let end = span.end.clamp(start, text.len());
    let first_line = text.get(start..end).and_then(|marked| marked.find('\n'));
    start..first_line.map_or(end, |length| start + length)
}

/// Collects problems while a file is read.
#[derive(Debug, Default)]
pub(super) struct Problems {
    own: RefCell<Vec<Problem>>,
    others: RefCell<Vec<FileErrors>>,
}

impl Problems {
    pub(super) fn add(&self, problem: Problem) -> Reported {
        self.own.borrow_mut().push(problem);
        Reported(())
    }

    pub(super) fn add_file(&self, errors: ConfigErrors) -> Reported {
        self.others.borrow_mut().extend(errors.files);
        Reported(())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.own.borrow().is_empty() && self.others.borrow().is_empty()
    }

    pub(super) fn into_errors(self, name: &str, text: &str) -> ConfigErrors {
        let mut problems = self.own.into_inner();
        problems.sort_by_key(Problem::start);
        let own = FileErrors { name: name.to_owned(), text: text.to_owned(), problems };
        let mut files = self.others.into_inner();
        files.insert(0, own);
        files.retain(|file| !file.problems.is_empty());
        ConfigErrors { files }
    }
}

#[derive(Debug, Clone)]
struct FileErrors {
    name: String,
    text: String,
    problems: Vec<Problem>,
}

/// Everything that is wrong with a configuration, over all files that it consists of.
///
/// Its `Display` shows each error with file, line and column, the line itself, and what to write instead, and counts
/// them at the end.
#[derive(Debug, Clone)]
pub struct ConfigErrors {
    files: Vec<FileErrors>,
}

impl ConfigErrors {
    /// One error about a file as a whole.
    #[must_use]
    pub fn of_file(name: &str, complaint: Complaint) -> Self {
        let file =
            FileErrors { name: name.to_owned(), text: String::new(), problems: vec![Problem::at(None, complaint)] };
        Self { files: vec![file] }
    }

    /// How many errors there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.files.iter().map(|file| file.problems.len()).sum()
    }

    /// The text for people, in colours if `color`.
    #[must_use]
    pub fn render(&self, color: bool) -> String {
        let renderer = if color { Renderer::styled() } else { Renderer::plain() };
        let mut text = String::new();
        for file in &self.files {
            for problem in &file.problems {
                text.push_str(&renderer.render(&[problem.group(&file.name, &file.text)]));
                text.push_str("\n\n");
            }
        }
        let count = self.count();
        let files: Vec<_> = self.files.iter().map(|file| file.name.as_str()).collect();
        text.push_str(&format!("{count} error{} in {}", if count == 1 { "" } else { "s" }, files.join(", ")));
        text
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(false))
    }
}

impl std::error::Error for ConfigErrors {}
