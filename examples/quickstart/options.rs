//! What the command line says. Every option has a default that suits a laptop.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail};
use bytesize::ByteSize;
use clap::Parser;
use clap::builder::ValueParser;
use vmem::{VirtualMemoryConfig, VirtualMemoryError};

/// Stores every file of a directory under a small memory budget, reads them back in a skewed
/// random order from many tasks, and compares every byte with the file.
///
/// Sizes are such as 64MiB or 2GB. Symbolic links are not followed, special files and other file
/// systems below the directory are left out. Exit status: 0 if nothing differed, 1 if something
/// did or failed, 2 if it could not start, 130 after Ctrl-C.
#[derive(Clone, Debug, Parser)]
#[command(name = "quickstart", disable_version_flag = true)]
pub(crate) struct Options {
    /// The directory to store [default: the libraries of the Rust toolchain]
    dir: Option<PathBuf>,

    /// Host memory that the store may use
    #[arg(long, value_name = "SIZE", default_value = "64MiB")]
    host: ByteSize,

    /// Disk space that the store may use [default: a quarter more than the files]
    #[arg(long, value_name = "SIZE")]
    disk: Option<ByteSize>,

    /// Where the store keeps its data file [default: a private temporary directory]
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,

    /// Leave out files once this much is taken
    #[arg(long, value_name = "SIZE", default_value = "2GiB")]
    pub(crate) max: ByteSize,

    /// Tasks that store and read at the same time
    #[arg(long, value_name = "N", default_value_t = 16,
          value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub(crate) tasks: u16,

    /// Length of the phase of random reads
    #[arg(long, value_name = "SECONDS", default_value = "10",
          value_parser = ValueParser::new(parse_seconds))]
    pub(crate) seconds: Duration,

    /// Seed of the order and the kinds of the reads
    #[arg(long, value_name = "N", env = "VMEM_SEED", default_value_t = 1)]
    pub(crate) seed: u64,
}

impl Options {
    /// The directory to store.
    pub(crate) fn directory(&self) -> anyhow::Result<PathBuf> {
        let dir = match &self.dir {
            Some(dir) => dir.clone(),
            None => toolchain_libraries()?,
        };
        let found = dir.metadata().with_context(|| format!("cannot open {}", dir.display()))?;
        if !found.is_dir() {
            bail!("{} is not a directory", dir.display());
        }
        Ok(dir)
    }

    /// The store's configuration for files of this many bytes in all.
    pub(crate) fn config(
        &self,
        file_bytes: u64,
    ) -> Result<VirtualMemoryConfig, VirtualMemoryError> {
        // Small files are rounded up to blocks, and a file that is being written has its old and
        // its new blocks for a moment.
        let disk = self.disk.map_or(file_bytes + file_bytes / 4 + (64 << 20), |size| size.0);
        let config = VirtualMemoryConfig::builder().host_capacity(self.host.0).disk_capacity(disk);
        match &self.store {
            Some(dir) => config.disk_path(dir).build(),
            None => config.build(),
        }
    }
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("{text:?} is no number"))?;
    let most = Duration::from_secs(24 * 3600);
    match Duration::try_from_secs_f64(seconds) {
        Ok(length) if length <= most => Ok(length),
        Ok(_) => Err("at most a day".into()),
        Err(error) => Err(error.to_string()),
    }
}

/// Some hundred megabytes of real files that are there wherever this is built.
fn toolchain_libraries() -> anyhow::Result<PathBuf> {
    let advice = "no directory was given, and the Rust toolchain's own was not found: name one, \
                  as in `cargo run --release --example quickstart -- DIR`";
    let output = Command::new("rustc").args(["--print", "sysroot"]).output().context(advice)?;
    if !output.status.success() {
        bail!("{advice} (rustc: {})", output.status);
    }
    let sysroot = String::from_utf8(output.stdout).context(advice)?;
    Ok(PathBuf::from(sysroot.trim_end()).join("lib"))
}
