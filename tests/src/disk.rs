//! A disk so small that it can be filled.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::parts::Parts;

/// What fills it up.
const BALLAST: &str = "ballast";
/// Bytes written at a time, at first; then ever fewer, so that nothing is left.
const PIECE: usize = 64 << 10;

/// A file system in memory of a few megabytes, mounted on a folder. Dropping it unmounts it, and what is in it is gone.
#[derive(Debug)]
pub struct SmallDisk {
    folder: PathBuf,
}

impl SmallDisk {
    /// Whether this process may mount one.
    #[must_use]
    pub fn is_possible() -> bool {
        rustix::process::geteuid().is_root()
    }

    /// Mounts one on a folder, which is made.
    ///
    /// # Errors
    /// Only root may do that.
    pub fn mount(folder: &Path, megabytes: u32) -> Result<Self> {
        ensure!(Self::is_possible(), "small disks are mounted, which only root may do");
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        let size = format!("size={megabytes}m");
        let mut command = Command::new(Parts::command("mount")?);
        command.args(["-t", "tmpfs", "-o", &size, "tributary-small-disk"]).arg(folder);
        let output = command.output().context("running mount")?;
        ensure!(output.status.success(), "mounting {}: {}", folder.display(), String::from_utf8_lossy(&output.stderr));
        Ok(Self { folder: folder.to_owned() })
    }

    /// Fills it to the last byte.
    ///
    /// # Errors
    /// The file for that can't be made.
    pub fn fill(&self) -> Result<()> {
        let path = self.folder.join(BALLAST);
        let mut file = File::create(&path).with_context(|| format!("making {}", path.display()))?;
        let mut piece = vec![0; PIECE];
        while !piece.is_empty() {
            if file.write_all(&piece).is_err() {
                piece.truncate(piece.len() / 2);
            }
        }
        Ok(())
    }

    /// Gives the room back.
    ///
    /// # Errors
    /// The file can't be removed.
    pub fn relieve(&self) -> Result<()> {
        let path = self.folder.join(BALLAST);
        if path.exists() {
            // Emptied first: a process that was just started may hold a copy of the handle that filled it until it runs
            // its own program, and a removed file keeps its room while anyone holds it.
            File::create(&path).with_context(|| format!("emptying {}", path.display()))?;
            fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
        }
        Ok(())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a process that is being killed may still have a file open. Nothing can be done about an error.
        if let Ok(umount) = Parts::command("umount") {
            let _ = Command::new(umount).arg("-l").arg(&self.folder).output();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_can_be_filled_and_relieved_and_is_gone_at_the_end() -> Result<()> {
        if !SmallDisk::is_possible() {
            return Ok(());
        }
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("disk");
        let disk = SmallDisk::mount(&path, 1)?;
        fs::write(path.join("before"), "x")?;
        disk.fill()?;
        assert!(fs::write(path.join("more"), vec![1; 10_000]).is_err());
        disk.relieve()?;
        fs::write(path.join("more"), vec![1; 10_000])?;
        drop(disk);
        assert_eq!(fs::read_dir(&path)?.count(), 0);
        Ok(())
    }

    #[test]
    fn it_is_relieved_even_while_another_holds_what_filled_it() -> Result<()> {
        if !SmallDisk::is_possible() {
            return Ok(());
        }
        let folder = tempfile::tempdir()?;
        let disk = SmallDisk::mount(&folder.path().join("disk"), 1)?;
        disk.fill()?;
        let held = File::open(disk.folder.join(BALLAST))?;
        disk.relieve()?;
        fs::write(disk.folder.join("more"), vec![1; 10_000])?;
        drop(held);
        Ok(())
    }
}
