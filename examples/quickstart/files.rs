//! The files on the other side of the comparison: finding them, reading them, comparing with them.
//!
//! Everything here is ordinary blocking file access; the phases call it on blocking threads.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::Context;
use walkdir::WalkDir;

/// Files are read in pieces of this many bytes, so that a large one needs little memory.
pub(crate) const PIECE_BYTES: usize = 256 * 1024;

/// What was found in the directory.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) files: Vec<PathBuf>,
    /// Bytes of these files.
    pub(crate) bytes: u64,
    /// Files that `--max` leaves out.
    pub(crate) left_out: u64,
    /// Entries that could not be looked at.
    pub(crate) unreadable: Vec<String>,
}

/// Regular files below `dir`, in order of their names, to `max` bytes in all. Links are not
/// followed and other file systems not entered, so that nothing outside of `dir` is read.
pub(crate) fn find(dir: &Path, max: u64) -> anyhow::Result<Found> {
    dir.read_dir().with_context(|| format!("cannot read {}", dir.display()))?;
    let mut found = Found::default();
    for entry in WalkDir::new(dir).same_file_system(true).sort_by_file_name() {
        let seen = entry.and_then(|entry| {
            let len =
                if entry.file_type().is_file() { Some(entry.metadata()?.len()) } else { None };
            Ok((entry.into_path(), len))
        });
        match seen {
            Ok((_, None)) => {}
            Ok((_, Some(len))) if found.bytes.saturating_add(len) > max => found.left_out += 1,
            Ok((path, Some(len))) => {
                found.bytes += len;
                found.files.push(path);
            }
            Err(error) => found.unreadable.push(error.to_string()),
        }
    }
    Ok(found)
}

/// A file as it was when it was opened for storing.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    pub(crate) path: PathBuf,
    pub(crate) len: usize,
    modified: Option<SystemTime>,
}

impl Source {
    /// Opens the file and notes how it is.
    pub(crate) fn open(path: PathBuf) -> io::Result<(Source, File)> {
        let file = File::open(&path)?;
        let (len, modified) = stamp(&file)?;
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::FileTooLarge)?;
        Ok((Source { path, len, modified }, file))
    }

    /// Compares stored bytes with the file's bytes from `offset` on.
    pub(crate) fn compare(&self, offset: usize, stored: &[u8]) -> Verdict {
        match self.first_difference(offset, stored) {
            Ok(None) => Verdict::Same,
            Ok(Some(_)) if self.has_changed() => Verdict::Changed,
            Ok(Some(at)) => Verdict::Differs { at },
            // It became shorter.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Verdict::Changed,
            Err(error) => Verdict::Unreadable(error),
        }
    }

    fn first_difference(&self, offset: usize, stored: &[u8]) -> io::Result<Option<usize>> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(offset as u64))?;
        let mut buffer = vec![0; stored.len().min(PIECE_BYTES)];
        for (nth, stored) in stored.chunks(PIECE_BYTES).enumerate() {
            let piece = &mut buffer[..stored.len()];
            file.read_exact(piece)?;
            if piece != stored {
                let same = piece.iter().zip(stored).take_while(|(a, b)| a == b).count();
                return Ok(Some(offset + nth * PIECE_BYTES + same));
            }
        }
        Ok(None)
    }

    /// Whether the file was written to, or replaced, since it was opened for storing.
    fn has_changed(&self) -> bool {
        let now = File::open(&self.path).and_then(|file| stamp(&file));
        now.map_or(true, |now| now != (self.len as u64, self.modified))
    }
}

fn stamp(file: &File) -> io::Result<(u64, Option<SystemTime>)> {
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("no longer a regular file"));
    }
    Ok((metadata.len(), metadata.modified().ok()))
}

/// Reads the next bytes of an open file, exactly `len` of them.
pub(crate) fn read_piece(file: &mut File, len: usize) -> io::Result<Vec<u8>> {
    let mut piece = vec![0; len];
    file.read_exact(&mut piece)?;
    Ok(piece)
}

/// How a comparison ended.
#[derive(Debug)]
pub(crate) enum Verdict {
    Same,
    /// The stored bytes are wrong.
    Differs {
        /// The first byte that differs, from the start of the file.
        at: usize,
    },
    /// The file is no longer what was stored.
    Changed,
    Unreadable(io::Error),
}
