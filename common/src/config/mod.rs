//! Reading configuration files so that one run reports everything that is wrong with them.
//!
//! A file passes two stages. [`parse`] reads the TOML and hands its root to a function as a [`Table`], from which that
//! function asks each key by name, with the [kind] of value that belongs there (a size with a unit, a duration
//! within bounds, one of a few words). What is asked comes back as a [`Field`]: the value together with the place
//! where it is written. From fields the function builds its second stage, a validated type that the program uses and
//! that nothing else can make.
//!
//! Nothing stops at the first error. A key that is wrong is reported and its default takes its place, so that the keys
//! behind it are looked at too; keys that nobody asked for are reported when the table is dropped; relations between
//! fields ([`Table::require`]) are skipped when one of the fields is wrong already, so that no error is a mere
//! consequence of another. If anything was reported, [`parse`] returns all of it as [`ConfigErrors`].
//!
//! Sizes and durations always say their unit (`"64 MiB"`, `"5m"`). Zero is accepted only where a field's bounds say so.

mod errors;
pub mod kind;
mod table;
mod units;

use std::path::Path;

use toml::de::DeTable;

pub use errors::{Complaint, ConfigErrors, Place, Reported};
pub use kind::nearest;
pub use table::{Field, Table};
pub use units::{parse_duration, parse_size, show_duration, show_size};

use errors::{Problem, Problems};

/// The outcome of reading something from a file: the proof that the error was [`Reported`] stands for all that is
/// known about a failure.
pub type Read<T> = Result<T, Reported>;

/// One kibibyte, mebibyte, gibibyte in bytes.
pub use bytesize::{GIB, KIB, MIB};

/// Reads the TOML `text` of the file `name` by the function `read`, which gets the root table.
///
/// # Errors
/// Everything that is wrong with the file: its syntax (then nothing else is looked at), or all that `read` and the
/// tables that it used have reported.
pub fn parse<T>(name: &str, text: &str, read: impl FnOnce(&mut Table<'_>) -> Read<T>) -> Result<T, ConfigErrors> {
    let problems = Problems::default();
    let (root, syntax_errors) = DeTable::parse_recoverable(text);
    if !syntax_errors.is_empty() {
        for error in syntax_errors {
            let mut complaint = Complaint::new(format!("this is not TOML: {}", error.message()))
                .help("the rest of the file is checked once its syntax is right");
            if error.message().contains("string values must be quoted") {
                complaint = complaint.help("put the value between double quotes: \"…\"");
            }
            let _: Reported = problems.add(Problem::at(error.span(), complaint));
        }
        return Err(problems.into_errors(name, text));
    }
    let outcome = {
        let mut table = Table::root(&problems, root.get_ref());
        read(&mut table)
    };
    match outcome {
        Ok(value) if problems.is_empty() => Ok(value),
        _ => Err(problems.into_errors(name, text)),
    }
}

/// Reads the text of a configuration file.
///
/// # Errors
/// When the file can't be read or is not UTF-8.
pub fn read_text(path: &Path) -> Result<String, ConfigErrors> {
    let name = path.display().to_string();
    let bytes = std::fs::read(path).map_err(|error| {
        ConfigErrors::of_file(
            &name,
            Complaint::new(format!("the file can't be read: {error}"))
                .help("check the path, and that this user may read the file and enter its directories"),
        )
    })?;
    String::from_utf8(bytes).map_err(|error| {
        let good = error.utf8_error().valid_up_to();
        let line = error.as_bytes()[..good].iter().filter(|&&byte| byte == b'\n').count() + 1;
        ConfigErrors::of_file(
            &name,
            Complaint::new(format!("line {line} is not UTF-8 (byte {good} of the file)"))
                .help("TOML files are UTF-8: save the file in that encoding"),
        )
    })
}

#[cfg(test)]
mod tests;
