//! Unix sockets that are listened on, that of the API and those that VMs come by: their owner's alone, and never another's.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, fchmod};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};

/// How many may wait to be accepted: as many as the kernel allows by default.
const BACKLOG: i32 = 4096;

/// Why there is no socket. Each names what asked for it.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// There is something else in its place, which may be a link.
    #[error("{what} {}: there is something that is not a socket; it is left as it is", path.display())]
    NotASocket {
        /// What asked for it.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
    },
    /// Another process serves it.
    #[error("{what} {}: another process listens on it", path.display())]
    InUse {
        /// What asked for it.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
    },
    /// It cannot be listened on.
    #[error("{what} {}: cannot listen on it", path.display())]
    Bind {
        /// What asked for it.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
}

/// A socket that is listened on. It is removed when this is dropped.
#[derive(Debug)]
pub struct PrivateSocket {
    path: PathBuf,
    listener: UnixListener,
    /// The file system and inode of ours.
    identity: (u64, u64),
}

impl PrivateSocket {
    /// Listens on `path`, which only this user can connect to. A socket that nobody listens on any more is replaced.
    /// `what` asks for it: an option, or a field of a request.
    ///
    /// # Errors
    /// When there is something else, or the kernel refuses.
    pub fn bind(what: &'static str, path: &Path) -> Result<Self, SocketError> {
        make_room(what, path)?;
        let bind = || {
            let listener = socket_with(
                AddressFamily::UNIX,
                SocketType::STREAM,
                SocketFlags::CLOEXEC,
                None,
            )?;
            // The file gets its mode from this: at no time can anybody else connect (unix(7), unix_bind in the kernel).
            fchmod(&listener, Mode::RUSR | Mode::WUSR)?;
            bind(&listener, &SocketAddrUnix::new(path)?)?;
            listen(&listener, BACKLOG)?;
            Ok((UnixListener::from(listener), identity(path)?))
        };
        let (listener, identity) = bind().map_err(|source| SocketError::Bind {
            what,
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            path: path.to_owned(),
            listener,
            identity,
        })
    }

    /// The socket itself.
    pub(crate) fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl AsFd for PrivateSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for PrivateSocket {
    fn drop(&mut self) {
        // Whoever has put something else in its place shall keep it.
        if identity(&self.path).is_ok_and(|identity| identity == self.identity)
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            log::debug!("{}: {error}", self.path.display());
        }
    }
}

/// Removes a socket that was left behind. Anything else stays.
fn make_room(what: &'static str, path: &Path) -> Result<(), SocketError> {
    let in_use = || SocketError::InUse {
        what,
        path: path.to_owned(),
    };
    match path.symlink_metadata() {
        Err(_) => return Ok(()),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(SocketError::NotASocket {
                what,
                path: path.to_owned(),
            });
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            // If it cannot be removed, binding fails, and says why.
            let _ = std::fs::remove_file(path);
            Ok(())
        }
        Ok(_) => Err(in_use()),
        // Someone who is too busy to take connections, or whom we may not connect to, is someone.
        Err(_) => Err(in_use()),
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = path.symlink_metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn bind(path: &Path) -> Result<PrivateSocket, SocketError> {
        PrivateSocket::bind("--test", path)
    }

    #[test]
    fn socket_is_its_users_alone_and_goes_when_it_is_done() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api");
        let socket = bind(&path).unwrap();
        let mode = path.symlink_metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        let error = bind(&path).unwrap_err();
        assert!(matches!(error, SocketError::InUse { .. }));
        assert!(error.to_string().starts_with("--test "), "{error}");
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn socket_left_behind_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api");
        drop(UnixListener::bind(&path).unwrap());
        let _socket = bind(&path).unwrap();
        assert!(UnixStream::connect(&path).is_ok());
    }

    #[test]
    fn what_is_no_socket_stays() {
        let folder = tempfile::tempdir().unwrap();
        let (target, file, link) = (
            folder.path().join("target"),
            folder.path().join("file"),
            folder.path().join("link"),
        );
        fs::write(&file, "precious").unwrap();
        symlink(&target, &link).unwrap();
        for path in [&file, &link] {
            assert!(matches!(bind(path), Err(SocketError::NotASocket { .. })));
        }
        assert_eq!(fs::read_to_string(file).unwrap(), "precious");
        assert!(!target.exists());
        // Nor is a link to a socket that nobody listens on followed.
        drop(UnixListener::bind(&target).unwrap());
        assert!(bind(&link).is_err());
        assert!(target.exists());
    }

    #[test]
    fn what_took_its_place_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api");
        let socket = bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "another's").unwrap();
        drop(socket);
        assert_eq!(fs::read_to_string(&path).unwrap(), "another's");
    }
}
