//! The programs under test, built from the same source as the tests.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::{env, fs};

use anyhow::{Context, Result, bail, ensure};

/// Where the programs are.
#[derive(Clone, Debug)]
pub struct Programs {
    /// `tributary-agent`
    pub agent: PathBuf,
    /// `tributary-aggregator`
    pub aggregator: PathBuf,
    /// The folder of cargo's output that they, and whoever asks, were built into: `target`.
    pub target: PathBuf,
}

impl Programs {
    /// Finds them beside the running executable. Under cargo it first has cargo build them with the same profile, because
    /// testing one package of a workspace does not build the programs of another, and an old one would be tested instead.
    ///
    /// # Errors
    /// They can't be built, or are not there; the message says what to run.
    pub fn find() -> Result<Self> {
        static FOUND: OnceLock<Result<Programs, String>> = OnceLock::new();
        let found = FOUND.get_or_init(|| Self::find_once().map_err(|error| format!("{error:#}")));
        found.clone().map_err(anyhow::Error::msg)
    }

    fn find_once() -> Result<Self> {
        let own = env::current_exe().context("asking for the running executable")?;
        let mut folder = own.parent().context("an executable is in a folder")?;
        if folder.ends_with("deps") {
            folder = folder.parent().context("deps is in a folder")?;
        }
        let target = folder.parent().context("a profile's folder is in a folder")?;
        if let Some(cargo) = env::var_os("CARGO") {
            build(cargo, folder, target)?;
        }
        let program = |name: &str| -> Result<PathBuf> {
            let file = folder.join(name);
            ensure!(file.is_file(), "{} is not there: run cargo build --workspace first", file.display());
            Ok(file)
        };
        Ok(Self {
            agent: program("tributary-agent")?,
            aggregator: program("tributary-aggregator")?,
            target: target.to_owned(),
        })
    }

    /// A folder below cargo's output, for what outlives a test run, like its reports.
    ///
    /// # Errors
    /// It can't be made.
    pub fn output_folder(&self, name: &str) -> Result<PathBuf> {
        let folder = self.target.join(name);
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        Ok(folder)
    }
}

fn build(cargo: OsString, folder: &Path, target: &Path) -> Result<()> {
    let profile = match folder.file_name().and_then(|name| name.to_str()) {
        Some("debug") => "dev",
        Some(name) => name,
        None => bail!("{} names no profile", folder.display()),
    };
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut command = Command::new(cargo);
    // All programs of the workspace, as tests/run.sh builds them, so that this finds them ready.
    command.args(["build", "--quiet", "--workspace", "--bins", "--profile", profile, "--target-dir"]).arg(target);
    let built = command.current_dir(workspace).output().context("running cargo build")?;
    ensure!(built.status.success(), "cargo build failed:\n{}", String::from_utf8_lossy(&built.stderr));
    Ok(())
}
