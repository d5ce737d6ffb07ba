//! The directory that a snapshot is in. What is in it is for its owner's eyes only: it has all of a guest's secrets.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, openat, renameat, unlinkat};
use rustix::io::Errno;

use super::SnapshotError;

/// A directory. What has been made for a snapshot which does not become complete is removed on drop.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    fd: OwnedFd,
    /// Whether the directory itself has been made for it.
    is_new: bool,
    unfinished: Vec<String>,
}

impl Folder {
    /// Opens a directory that has a snapshot.
    pub(super) fn open(path: &Path) -> Result<Self, SnapshotError> {
        let fd = File::open(path).and_then(|file| match file.metadata()?.is_dir() {
            true => Ok(file.into()),
            false => Err(io::ErrorKind::NotADirectory.into()),
        });
        Ok(Self {
            path: path.to_owned(),
            fd: fd.map_err(|source| SnapshotError::File {
                path: path.to_owned(),
                source,
            })?,
            is_new: false,
            unfinished: Vec::new(),
        })
    }

    /// Makes a directory unless there is one, which must not have a snapshot: no file with this name.
    pub(super) fn create(path: &Path, complete: &str) -> Result<Self, SnapshotError> {
        let is_new = match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            Err(source) => {
                return Err(SnapshotError::File {
                    path: path.to_owned(),
                    source,
                });
            }
        };
        let mut folder = Self::open(path)?;
        folder.is_new = is_new;
        if fs::symlink_metadata(folder.path(complete)).is_ok() {
            return Err(SnapshotError::Exists(path.to_owned()));
        }
        Ok(folder)
    }

    /// The path of a file in it.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Makes a new file. What a snapshot that did not become complete has left is replaced.
    pub(super) fn create_file(&mut self, name: &str) -> Result<File, SnapshotError> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let create = || openat(&self.fd, name, flags, Mode::RUSR | Mode::WUSR);
        let created = match create() {
            Err(Errno::EXIST) => unlinkat(&self.fd, name, AtFlags::empty()).and_then(|()| create()),
            created => created,
        };
        let file = created.map_err(|error| self.error(name, error.into()))?;
        self.unfinished.push(name.to_owned());
        Ok(file.into())
    }

    /// Sees that a file's content outlives the host.
    pub(super) fn keep(&self, name: &str, file: &File) -> Result<(), SnapshotError> {
        file.sync_all().map_err(|error| self.error(name, error))
    }

    /// Writes the file that makes the snapshot complete, all at once.
    pub(super) fn complete(mut self, name: &str, content: &[u8]) -> Result<(), SnapshotError> {
        let partial = format!("{name}.partial");
        let mut file = self.create_file(&partial)?;
        file.write_all(content)
            .map_err(|error| self.error(&partial, error))?;
        self.keep(&partial, &file)?;
        renameat(&self.fd, partial.as_str(), &self.fd, name)
            .and_then(|()| rustix::fs::fsync(&self.fd))
            .map_err(|error| self.error(name, error.into()))?;
        self.is_new = false;
        self.unfinished.clear();
        Ok(())
    }

    /// Opens a file of a snapshot.
    pub(super) fn open_file(&self, name: &str) -> Result<File, SnapshotError> {
        let file = self.open_file_if_any(name)?;
        file.ok_or_else(|| self.error(name, Errno::NOENT.into()))
    }

    /// Opens a file, if there is one. A link is none: it could lead anywhere.
    pub(super) fn open_file_if_any(&self, name: &str) -> Result<Option<File>, SnapshotError> {
        // One that is a pipe or a device does not hold up whoever opens it.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match openat(&self.fd, name, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(self.error(name, error.into())),
        };
        let is_file = file.metadata().map(|metadata| metadata.is_file());
        match is_file {
            Ok(true) => Ok(Some(file)),
            Ok(false) => Err(self.error(name, io::Error::other("it is not a file"))),
            Err(error) => Err(self.error(name, error)),
        }
    }

    fn error(&self, name: &str, source: io::Error) -> SnapshotError {
        SnapshotError::File {
            path: self.path(name),
            source,
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        for name in &self.unfinished {
            let _ = unlinkat(&self.fd, name.as_str(), AtFlags::empty());
        }
        if self.is_new {
            // Unless somebody else has put something there.
            let _ = fs::remove_dir(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn what_is_not_complete_is_removed() {
        let outer = tempfile::tempdir().unwrap();
        let path = outer.path().join("snapshot");
        let mut folder = Folder::create(&path, "all").unwrap();
        folder.create_file("a").unwrap();
        drop(folder);
        assert!(!path.exists());
        fs::create_dir(&path).unwrap();
        let mut folder = Folder::create(&path, "all").unwrap();
        folder.create_file("a").unwrap();
        drop(folder);
        assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
        fs::remove_dir(&path).unwrap();

        let mut folder = Folder::create(&path, "all").unwrap();
        folder.create_file("a").unwrap();
        folder.complete("all", b"{}").unwrap();
        assert_eq!(fs::read_dir(&path).unwrap().count(), 2);
        assert!(matches!(
            Folder::create(&path, "all"),
            Err(SnapshotError::Exists(_))
        ));
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(
            [mode(&path), mode(&path.join("a")), mode(&path.join("all"))],
            [0o700, 0o600, 0o600]
        );
    }

    #[test]
    fn links_and_pipes_are_no_files_of_a_snapshot() {
        let outer = tempfile::tempdir().unwrap();
        let path = |name| outer.path().join(name);
        fs::write(path("victim"), "kept").unwrap();
        symlink(path("victim"), path("link")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            path("pipe"),
            rustix::fs::FileType::Fifo,
            Mode::RUSR,
            0,
        )
        .unwrap();
        let mut folder = Folder::open(outer.path()).unwrap();
        assert!(folder.open_file("link").is_err());
        assert!(folder.open_file("pipe").is_err());
        assert!(folder.open_file_if_any("nothing").unwrap().is_none());
        // One that is in the way is replaced, not followed.
        folder
            .create_file("link")
            .unwrap()
            .write_all(b"new")
            .unwrap();
        assert_eq!(fs::read_to_string(path("victim")).unwrap(), "kept");
        assert!(Folder::open(&path("victim")).is_err());
    }
}
