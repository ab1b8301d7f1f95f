//! One table of a file, asked key by key.

use std::collections::BTreeSet;
use std::ops::{Deref, Range};

use serde_spanned::Spanned;
use toml::de::{DeTable, DeValue};

use super::Read;
use super::errors::{Complaint, ConfigErrors, Place, Problem, Problems, Reported};
use super::kind::{self, Kind, Spot};

/// A value together with the place where it is written.
#[derive(Debug, Clone)]
pub struct Field<T> {
    value: T,
    place: Place,
}

impl<T> Field<T> {
    /// The value alone.
    pub fn into_value(self) -> T {
        self.value
    }

    /// Where it is written.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Whether the file says it.
    #[must_use]
    pub fn is_written(&self) -> bool {
        self.place.is_written()
    }
}

impl<T> Deref for Field<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.value
    }
}

/// A table of the file (or, where the file doesn't have it, an empty one in its place).
///
/// Every key must be asked for: when the table is dropped, those that nobody asked for are reported as unknown.
#[derive(Debug)]
pub struct Table<'d> {
    problems: &'d Problems,
    entries: Option<&'d DeTable<'d>>,
    /// The head of the table or, where the file doesn't have it, of the one that it would be in.
    head: Range<usize>,
    /// Such as `root.` or, for the root table, nothing.
    prefix: String,
    asked: BTreeSet<String>,
}

#[expect(clippy::needless_pass_by_value, reason = "kinds are made where they are used, and only there")]
impl<'d> Table<'d> {
    pub(super) fn root(problems: &'d Problems, entries: &'d DeTable<'d>) -> Self {
        // What is missing in the root table belongs before the first heading, so at the top.
        Self { problems, entries: Some(entries), head: 0..0, prefix: String::new(), asked: BTreeSet::new() }
    }

    fn below(&self, key: &str, value: Option<&'d Spanned<DeValue<'d>>>) -> Self {
        let entries = value.and_then(|value| value.get_ref().as_table());
        Self {
            problems: self.problems,
            entries,
            head: value.map_or_else(|| self.head.clone(), Spanned::span),
            prefix: format!("{}{key}.", self.prefix),
            asked: BTreeSet::new(),
        }
    }

    /// Whether the file has this table.
    #[must_use]
    pub fn is_written(&self) -> bool {
        self.entries.is_some()
    }

    fn take(&mut self, key: &str) -> Option<&'d Spanned<DeValue<'d>>> {
        self.asked.insert(key.to_owned());
        self.entries.and_then(|entries| entries.get(key))
    }

    /// Reads a key that is there; `None` if it is not.
    fn read<K: Kind>(&mut self, key: &str, kind: &K) -> Option<(Read<K::Out>, Place)> {
        let value = self.take(key)?;
        let full_key = format!("{}{key}", self.prefix);
        let read = kind.read(&Spot::new(self.problems, &full_key), value);
        let shown = read.as_ref().map_or_else(|_| String::new(), |value| kind.show(value));
        let place = Place { key: full_key, shown, span: Some(value.span()), valid: read.is_ok() };
        Some((read, place))
    }

    fn unwritten(&self, key: &str, shown: String) -> Place {
        Place { key: format!("{}{key}", self.prefix), shown, span: None, valid: true }
    }

    /// The value of `key`, or `default` where the file doesn't say it.
    pub fn or<K: Kind>(&mut self, key: &str, kind: K, default: K::Out) -> Field<K::Out> {
        match self.read(key, &kind) {
            Some((Ok(value), place)) => Field { value, place },
            Some((Err(_), place)) => Field { value: default, place },
            None => {
                let place = self.unwritten(key, kind.show(&default));
                Field { value: default, place }
            }
        }
    }

    /// The value of `key`, or where the file doesn't say it that of another table's field, or else `default`.
    pub fn inherit<K: Kind>(
        &mut self,
        key: &str,
        kind: K,
        other: Option<&Field<K::Out>>,
        default: K::Out,
    ) -> Field<K::Out>
    where
        K::Out: Clone,
    {
        match (self.take(key), other) {
            (None, Some(other)) => other.clone(),
            _ => self.or(key, kind, default),
        }
    }

    /// The value of `key`, if the file says it.
    pub fn optional<K: Kind>(&mut self, key: &str, kind: K) -> Field<Option<K::Out>> {
        match self.read(key, &kind) {
            Some((value, place)) => Field { value: value.ok(), place },
            None => Field { value: None, place: self.unwritten(key, "not set".to_owned()) },
        }
    }

    /// The value of `key`, which must be there.
    ///
    /// # Errors
    /// When it is missing or wrong, which has been reported.
    pub fn required<K: Kind>(&mut self, key: &str, kind: K) -> Read<Field<K::Out>> {
        match self.read(key, &kind) {
            Some((value, place)) => Ok(Field { value: value?, place }),
            None => Err(self.missing(key, &kind.example())),
        }
    }

    /// Reports that `key` is missing, with an example of what to write.
    pub fn missing(&self, key: &str, example: &str) -> Reported {
        let table = self.prefix.trim_end_matches('.');
        let inside = if table.is_empty() { String::new() } else { format!(" in `{table}`") };
        self.problems.add(Problem::at(
            Some(self.head.clone()),
            Complaint::new(format!("`{key}` is missing{inside}"))
                .label(format!("`{key}` belongs here"))
                .help(format!("write {key} = {example}")),
        ))
    }

    /// The table below `key`; an empty one if the file doesn't have it.
    pub fn table(&mut self, key: &str) -> Self {
        let value = self.take(key);
        if let Some(value) = value
            && !value.get_ref().is_table()
        {
            let _: Reported = self.wrong_kind(key, value, "a table", &format!("[{}{key}]", self.prefix));
        }
        self.below(key, value)
    }

    /// The tables `[[key]]`, in the order of the file.
    pub fn tables(&mut self, key: &str) -> Vec<Self> {
        let Some(value) = self.take(key) else { return Vec::new() };
        let heading = format!("[[{}{key}]]", self.prefix);
        let Some(items) = value.get_ref().as_array() else {
            let _: Reported = self.wrong_kind(key, value, "a list of tables", &heading);
            return Vec::new();
        };
        let mut tables = Vec::new();
        for item in items.iter() {
            if item.get_ref().is_table() {
                tables.push(self.below(key, Some(item)));
            } else {
                let _: Reported = self.wrong_kind(key, item, "a table", &heading);
            }
        }
        tables
    }

    /// The tables `[key.<name>]` with their names, sorted by name.
    pub fn named_tables(&mut self, key: &str) -> Vec<(Field<String>, Self)> {
        let Some(value) = self.take(key) else { return Vec::new() };
        let heading = format!("[{}{key}.<name>]", self.prefix);
        let Some(entries) = value.get_ref().as_table() else {
            let _: Reported = self.wrong_kind(key, value, "tables with names", &heading);
            return Vec::new();
        };
        let mut tables = Vec::new();
        for (name, item) in entries {
            if !item.get_ref().is_table() {
                let _: Reported = self.wrong_kind(key, item, "a table", &heading);
                continue;
            }
            let full_key = format!("{key}.{}", name.get_ref());
            let place = Place {
                key: format!("{}{full_key}", self.prefix),
                shown: format!("{:?}", name.get_ref()),
                span: Some(name.span()),
                valid: true,
            };
            tables.push((Field { value: name.get_ref().to_string(), place }, self.below(&full_key, Some(item))));
        }
        tables
    }

    fn wrong_kind(&self, key: &str, value: &Spanned<DeValue<'_>>, wanted: &str, heading: &str) -> Reported {
        let found = kind::name_of(value.get_ref());
        self.problems.add(Problem::at(
            Some(value.span()),
            Complaint::new(format!("`{}{key}` must be {wanted}", self.prefix))
                .label(format!("this is {found}"))
                .help(format!("write {heading} on a line of its own, and its keys below")),
        ))
    }

    /// Reports `complaint` at the head of this table.
    pub fn complain(&self, complaint: Complaint) -> Reported {
        self.problems.add(Problem::at(Some(self.head.clone()), complaint))
    }

    /// Reports `complaint` at a field (or, where it isn't written, at the head of this table).
    pub fn complain_at(&self, place: &Place, complaint: Complaint) -> Reported {
        self.problems.add(Problem::at(Some(place.span.clone().unwrap_or_else(|| self.head.clone())), complaint))
    }

    /// Reports `complaint` about several fields, showing the value of each. Says nothing when one of them is wrong
    /// anyway and its error has been reported.
    pub fn complain_between(&self, places: &[&Place], complaint: Complaint) -> Reported {
        match places.iter().find(|place| !place.valid) {
            Some(_) => Reported::before(),
            None => self.problems.add(Problem::between(places, complaint)),
        }
    }

    /// Reports that `rule`, a relation between fields written as an inequality, doesn't hold.
    pub fn require(&self, holds: bool, rule: &str, why: &str, places: &[&Place]) {
        if !holds {
            let complaint = Complaint::new(format!("this must hold: {rule}")).help(why);
            let _: Reported = self.complain_between(places, complaint);
        }
    }

    /// Takes over the errors of another file that this one refers to.
    pub fn complain_about_file(&self, errors: ConfigErrors) -> Reported {
        self.problems.add_file(errors)
    }
}

impl Drop for Table<'_> {
    fn drop(&mut self) {
        let Some(entries) = self.entries else { return };
        for (key, _) in entries {
            let name = key.get_ref().as_ref();
            if self.asked.contains(name) {
                continue;
            }
            let mut complaint = Complaint::new(format!("unknown key `{}{name}`", self.prefix)).label("unknown");
            let missing = self.asked.iter().map(String::as_str).filter(|known| !entries.contains_key(*known));
            complaint = match kind::nearest(name, missing) {
                Some(known) => complaint.help(format!("did you mean `{known}`?")),
                None => {
                    let known: Vec<_> = self.asked.iter().map(|known| format!("`{known}`")).collect();
                    complaint.help(format!("the keys known here are {}", known.join(", ")))
                }
            };
            let _: Reported = self.problems.add(Problem::at(Some(key.span()), complaint));
        }
    }
}
