//! The kinds of values that a key can have: how each is read, bounded, shown, and what to write instead.

use std::fmt::{self, Display};
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use serde_spanned::Spanned;
use toml::de::DeValue;

use super::Read;
use super::errors::{Complaint, Problem, Problems, Reported};
use super::units::{parse_duration, parse_size, show_duration, show_size};

/// Where a kind reports what is wrong with the value that it reads.
#[derive(Debug)]
pub struct Spot<'p> {
    problems: &'p Problems,
    key: &'p str,
}

impl<'p> Spot<'p> {
    pub(super) fn new(problems: &'p Problems, key: &'p str) -> Self {
        Self { problems, key }
    }

    /// The key that is read, with the tables that it is in.
    #[must_use]
    pub fn key(&self) -> &str {
        self.key
    }

    /// Reports `complaint` at `value`.
    pub fn complain(&self, value: &Spanned<DeValue<'_>>, complaint: Complaint) -> Reported {
        self.problems.add(Problem::at(Some(value.span()), complaint))
    }

    fn wrong_type(&self, value: &Spanned<DeValue<'_>>, wanted: &str, example: &str) -> Reported {
        let found = name_of(value.get_ref());
        self.complain(
            value,
            Complaint::new(format!("`{}` must be {wanted}", self.key))
                .label(format!("this is {found}"))
                .help(format!("write {} = {example}", self.bare_key())),
        )
    }

    fn out_of_bounds(&self, value: &Spanned<DeValue<'_>>, shown: &str, low: &str, high: &str) -> Reported {
        let mut complaint = Complaint::new(format!("`{}` is out of bounds", self.key))
            .label(format!("{shown} is not within {low} to {high}"))
            .help(format!("write a value from {low} to {high}"));
        if shown.starts_with("0 ") || shown == "0" || shown == "0s" {
            complaint = complaint.help("0 does not mean “unlimited” or “never”: there is always a bound");
        }
        self.complain(value, complaint)
    }

    fn bare_key(&self) -> &str {
        self.key.rsplit('.').next().unwrap_or(self.key)
    }
}

/// A kind of value.
pub trait Kind {
    /// What it is for the program.
    type Out;

    /// Reads it.
    ///
    /// # Errors
    /// When it is wrong, which has been reported at `spot`.
    fn read(&self, spot: &Spot<'_>, value: &Spanned<DeValue<'_>>) -> Read<Self::Out>;

    /// How a value is shown in an error.
    fn show(&self, value: &Self::Out) -> String;

    /// What a value looks like in TOML.
    fn example(&self) -> String;
}

/// How TOML calls what a value is, with its article.
pub(super) fn name_of(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "a number",
        DeValue::Float(_) => "a number with a fraction",
        DeValue::Boolean(_) => "a boolean",
        DeValue::Datetime(_) => "a date or time",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

/// The one of `known` that `written` is most probably meant to be, if any is near enough.
#[must_use]
pub fn nearest<'a>(written: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let plain = |word: &str| word.to_lowercase().replace(['-', ' '], "_");
    let written = plain(written);
    let allowed = (written.chars().count() / 3).max(1);
    known
        .into_iter()
        .map(|word| (strsim::damerau_levenshtein(&written, &plain(word)), word))
        .filter(|(distance, _)| *distance <= allowed)
        .min()
        .map(|(_, word)| word)
}

/// Text that is not empty.
#[must_use]
pub fn text() -> Text {
    Text { example: "\"…\"" }
}

/// See [`text`].
#[derive(Debug, Clone, Copy)]
pub struct Text {
    example: &'static str,
}

impl Text {
    /// Shows `example` (in TOML, with its quotes) where the key is missing.
    #[must_use]
    pub fn example(self, example: &'static str) -> Self {
        Self { example }
    }
}

impl Kind for Text {
    type Out = String;

    fn read(&self, spot: &Spot<'_>, value: &Spanned<DeValue<'_>>) -> Read<String> {
        match value.get_ref().as_str() {
            Some("") => Err(spot.complain(
                value,
                Complaint::new(format!("`{}` is empty", spot.key))
                    .label("nothing is written here")
                    .help("write a value, or leave the line out"),
            )),
            Some(text) => Ok(text.to_owned()),
            None => Err(spot.wrong_type(value, "text", self.example)),
        }
    }

    fn show(&self, value: &String) -> String {
        format!("{value:?}")
    }

    fn example(&self) -> String {
        self.example.to_owned()
    }
}

/// Text that `parse` turns into something else, or complains about.
pub fn text_as<T, F>(example: &'static str, parse: F) -> TextAs<F>
where
    F: Fn(&str) -> Result<T, Complaint>,
{
    TextAs { example, parse }
}

/// See [`text_as`].
#[derive(Debug, Clone, Copy)]
pub struct TextAs<F> {
    example: &'static str,
    parse: F,
}

impl<T: fmt::Debug, F: Fn(&str) -> Result<T, Complaint>> Kind for TextAs<F> {
    type Out = T;

    fn read(&self, spot: &Spot<'_>, value: &Spanned<DeValue<'_>>) -> Read<T> {
        let text = Text { example: self.example }.read(spot, value)?;
        (self.parse)(&text).map_err(|complaint| spot.complain(value, complaint))
    }

    fn show(&self, value: &T) -> String {
        format!("{value:?}")
    }

    fn example(&self) -> String {
        self.example.to_owned()
    }
}

/// Text that is parsed by its type, whose error says what is wrong and what to write.
pub fn parsed<T>(example: &'static str) -> TextAs<impl Fn(&str) -> Result<T, Complaint>>
where
    T: FromStr<Err: Display>,
{
    text_as(example, |text: &str| text.parse::<T>().map_err(|error| Complaint::new(error.to_string())))
}

/// A size in bytes within bounds, written with its unit: `"64 MiB"`.
#[must_use]
pub fn size(bounds: RangeInclusive<u64>) -> Size {
    Size { bounds }
}

/// See [`size`].
#[derive(Debug, Clone)]
pub struct Size {
    bounds: RangeInclusive<u64>,
}

impl Kind for Size {
    type Out = u64;

    fn read(&self, spot: &Spot<'_>, value: &Spanned<DeValue<'_>>) -> Read<u64> {
        const UNITS: &str = "the units are B, KiB, MiB, GiB, TiB (of 1,024) and kB, MB, GB, TB (of 1,000)";
        let bytes = match value.get_ref() {
            DeValue::String(text) => parse_size(text).map_err(|wrong| {
                spot.complain(
                    value,
                    Complaint::new(format!("`{}`: {wrong}", spot.key))
                        .label("not a size")
                        .help(format!("write a number and a unit, as in {}", self.example()))
                        .help(UNITS),
                )
            })?,
            DeValue::Integer(number) if number.as_str() == "0" => 0,
            DeValue::Integer(number) => {
                return Err(spot.complain(
                    value,
                    Complaint::new(format!("`{}` has no unit", spot.key))
                        .label("bytes, KiB, MiB?")
                        .help(format!("write \"{number} B\" if bytes are meant, else as in {}", self.example()))
                        .help(UNITS),
                ));
            }
            _ => return Err(spot.wrong_type(value, "a size with its unit", &self.example())),
        };
        if self.bounds.contains(&bytes) {
            return Ok(bytes);
        }
        Err(spot.out_of_bounds(
            value,
            &show_size(bytes),
            &show_size(*self.bounds.start()),
            &show_size(*self.bounds.end()),
        ))
    }

    fn show(&self, value: &u64) -> String {
        show_size(*value)
    }

    fn example(&self) -> String {
        let example = (64 * bytesize::MIB).clamp(*self.bounds.start(), *self.bounds.end());
        format!("\"{}\"", show_size(example))
    }
}

/// A duration within bounds, written with its unit: `"5m"`.
#[must_use]
pub fn duration(bounds: RangeInclusive<Duration>) -> Time {
    Time { bounds }
}

/// See [`duration`].
#[derive(Debug, Clone)]
pub struct Time {
    bounds: RangeInclusive<Duration>,
}

impl Kind for Time {
    type Out = Duration;

    fn read(&self, spot: &Spot<'_>, value: &Spanned<DeValue<'_>>) -> Read<Duration> {
        const UNITS: &str = "the units are ms, s, m (minutes), h, d";
        let duration = match value.get_ref() {
            DeValue::String(text) => parse_duration(text).map_err(|wrong| {
                spot.complain(
                    value,
                    Complaint::new(format!("`{}`: {wrong}", spot.key))
                        .label("not a duration")
                        .help(format!("write a number and a unit, as in {}", self.example()))
                        .help(UNITS),
                )
            })?,
            DeValue::Integer(number) if number.as_str() == "0" => Duration::ZERO,
            DeValue::Integer(number) => {
                return Err(spot.complain(
                    value,
                    Complaint::new(format!("`{}` has no unit", spot.key))
                        .label("seconds, minutes, hours?")
                        .help(format!("write \"{number}s\" if seconds are meant, else as in {}", self.example()))
                        .help(UNITS),
                ));
            }
            _ => return Err(spot.wrong_type(value, "a duration with its unit", &self.example())),
        };
        if self.bounds.contains(&duration) {
            return Ok(duration);
        }
        Err(spot.out_of_bounds(
            value,
            &show_duration(duration),
            &show_duration(*self.bounds.start()),
            &show_duration(*self.bounds.end()),
        ))
    }

    fn show(&self, value: &Duration) -> String {
        show_duration(*value)
    }

    fn example(&self) -> String {
        let example = Duration::from_secs(30).clamp(*self.bounds.start(), *self.bounds.end());
        format!("\"{}\"", show_duration(example))
    }
}

/// A whole number within bounds.
#[must_use]
pub fn integer<N>(bounds: RangeInclusive<N>) -> Integer<N> {
    Integer { bounds }
}

/// See [`integer`].
#[derive(Debug, Clone)]
pub struct Integer<N> {
    bounds: RangeInclusive<N>,
}

impl<N: Copy + PartialOrd + Display + TryFrom<i128>> Kind for Integer<N> {
    type Out = N;

    fn read(&self, spot: &Spot<'_>, value: &Spanned<DeValue<'_>>) -> Read<N> {
        let DeValue::Integer(number) = value.get_ref() else {
            return Err(spot.wrong_type(value, "a whole number", &self.example()));
        };
        i128::from_str_radix(number.as_str(), number.radix())
            .ok()
            .and_then(|number| N::try_from(number).ok())
            .filter(|number| self.bounds.contains(number))
            .ok_or_else(|| {
                let (low, high) = (self.bounds.start().to_string(), self.bounds.end().to_string());
                spot.out_of_bounds(value, &number.to_string(), &low, &high)
            })
    }

    fn show(&self, value: &N) -> String {
        value.to_string()
    }

    fn example(&self) -> String {
        self.bounds.start().to_string()
    }
}

/// `true` or `false`.
#[must_use]
pub fn flag() -> Flag {
    Flag
}

/// See [`flag`].
#[derive(Debug, Clone, Copy)]
pub struct Flag;

impl Kind for Flag {
    type Out = bool;

    fn read(&self, spot: &Spot<'_>, value: &Spanned<DeValue<'_>>) -> Read<bool> {
        value.get_ref().as_bool().ok_or_else(|| spot.wrong_type(value, "true or false, without quotes", "true"))
    }

    fn show(&self, value: &bool) -> String {
        value.to_string()
    }

    fn example(&self) -> String {
        "true".to_owned()
    }
}

/// One of a few words.
#[must_use]
pub fn choice<T>(words: &'static [(&'static str, T)]) -> Choice<T> {
    Choice { words }
}

/// See [`choice`].
#[derive(Debug, Clone, Copy)]
pub struct Choice<T: 'static> {
    words: &'static [(&'static str, T)],
}

impl<T: Copy + PartialEq> Kind for Choice<T> {
    type Out = T;

    fn read(&self, spot: &Spot<'_>, value: &Spanned<DeValue<'_>>) -> Read<T> {
        let all = self.words.iter().map(|(word, _)| format!("\"{word}\"")).collect::<Vec<_>>().join(", ");
        let Some(written) = value.get_ref().as_str() else {
            return Err(spot.wrong_type(value, &format!("one of {all}"), &self.example()));
        };
        if let Some((_, meaning)) = self.words.iter().find(|(word, _)| *word == written) {
            return Ok(*meaning);
        }
        let complaint = Complaint::new(format!("`{}` can't be {written:?}", spot.key)).label("unknown");
        let help = match nearest(written, self.words.iter().map(|(word, _)| *word)) {
            Some(word) => format!("did you mean \"{word}\"? All that is possible: {all}"),
            None => format!("write one of {all}"),
        };
        Err(spot.complain(value, complaint.help(help)))
    }

    fn show(&self, value: &T) -> String {
        self.words
            .iter()
            .find(|(_, meaning)| meaning == value)
            .map_or_else(String::new, |(word, _)| format!("{word:?}"))
    }

    fn example(&self) -> String {
        self.words.first().map_or_else(String::new, |(word, _)| format!("{word:?}"))
    }
}

/// A list with at least one item; a single item may stand without the brackets.
pub fn list<K: Kind>(item: K) -> List<K> {
    List { item }
}

/// See [`list`].
#[derive(Debug, Clone, Copy)]
pub struct List<K> {
    item: K,
}

impl<K: Kind> Kind for List<K> {
    type Out = Vec<K::Out>;

    fn read(&self, spot: &Spot<'_>, value: &Spanned<DeValue<'_>>) -> Read<Self::Out> {
        let Some(items) = value.get_ref().as_array() else {
            return self.item.read(spot, value).map(|item| vec![item]);
        };
        if items.is_empty() {
            return Err(spot.complain(
                value,
                Complaint::new(format!("`{}` is empty", spot.key)).label("nothing in it").help(format!(
                    "write {} = {}",
                    spot.bare_key(),
                    self.example()
                )),
            ));
        }
        // All are read before the first error counts, so that all errors are reported.
        let read: Vec<_> = items.iter().map(|item| self.item.read(spot, item)).collect();
        read.into_iter().collect()
    }

    fn show(&self, value: &Self::Out) -> String {
        format!("[{}]", value.iter().map(|item| self.item.show(item)).collect::<Vec<_>>().join(", "))
    }

    fn example(&self) -> String {
        format!("[{}]", self.item.example())
    }
}
