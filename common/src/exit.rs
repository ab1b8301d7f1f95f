//! How the programs end.

use std::process::ExitCode;

/// The outcome of a program, told to whoever started it.
///
/// | code | meaning |
/// |---|---|
/// | 0 | done |
/// | 1 | failed: the log says why |
/// | 2 | done, but not wholly: `hours wait` found an hour that will never be complete |
/// | 64 | the command line is wrong (`EX_USAGE` of `sysexits.h`) |
/// | 78 | the configuration is wrong (`EX_CONFIG`); starting again won't help |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// Failed, or stopped at once by a second signal.
    Failed = 1,
    /// What was waited for is there, not whole, and will never be.
    Partial = 2,
    /// The command line is wrong.
    Usage = 64,
    /// The configuration is wrong.
    Config = 78,
}

impl Exit {
    /// The number.
    #[must_use]
    pub fn code(self) -> u8 {
        self as u8
    }

    /// How a program ends whose command line parser returned an error with this exit code. The texts of `--help` and
    /// `--version` come as errors too, with 0 (`clap::Error::exit_code`).
    #[must_use]
    pub fn of_command_line(parser_exit_code: i32) -> Self {
        if parser_exit_code == 0 { Self::Done } else { Self::Usage }
    }
}

/// What was asked for on the command line can't be meant: [`Exit::Usage`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit.code())
    }
}

#[cfg(test)]
mod tests {
    use super::Exit;

    #[test]
    fn help_is_no_error_and_a_wrong_command_line_is_usage() {
        assert_eq!(Exit::of_command_line(0), Exit::Done);
        assert_eq!(Exit::of_command_line(2).code(), 64);
        assert_eq!((Exit::Failed.code(), Exit::Partial.code(), Exit::Config.code()), (1, 2, 78));
    }
}
