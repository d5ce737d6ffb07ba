//! The socket that the API is served on: its owner's alone, and never another's.

use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, chmodat};
use rustix::process::umask;

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// There is something else in its place, which may be a link.
    #[error("--api-socket {}: there is something that is not a socket; it is left as it is", .0.display())]
    NotASocket(PathBuf),
    /// Another process serves it.
    #[error("--api-socket {}: another process listens on it", .0.display())]
    InUse(PathBuf),
    /// It cannot be listened on.
    #[error("--api-socket {}: cannot listen on it", path.display())]
    Bind {
        /// The socket.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
}

/// A socket that is listened on. It is removed when this is dropped.
#[derive(Debug)]
pub struct ApiSocket {
    path: PathBuf,
    listener: UnixListener,
    /// The file system and inode of ours.
    identity: (u64, u64),
}

impl ApiSocket {
    /// Listens on `path`, which only this user can connect to. A socket that nobody listens on any more is replaced. To be
    /// called before there are other threads: it sets the process' umask for a moment.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        make_room(path)?;
        let bind = || {
            // Nobody else can connect, not even before its mode is set.
            let before = umask(Mode::RWXG | Mode::RWXO | Mode::XUSR);
            let listener = UnixListener::bind(path);
            umask(before);
            let listener = listener?;
            listener.set_nonblocking(true)?;
            chmodat(CWD, path, Mode::RUSR | Mode::WUSR, AtFlags::empty())?;
            let identity = identity(path)?;
            Ok((listener, identity))
        };
        let (listener, identity) = bind().map_err(|source| SocketError::Bind {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            path: path.to_owned(),
            listener,
            identity,
        })
    }

    /// The socket itself, non-blocking.
    pub(super) fn listener(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }
}

impl Drop for ApiSocket {
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
fn make_room(path: &Path) -> Result<(), SocketError> {
    match path.symlink_metadata() {
        Err(_) => return Ok(()),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(SocketError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            // If it cannot be removed, binding fails, and says why.
            let _ = std::fs::remove_file(path);
            Ok(())
        }
        Ok(_) => Err(SocketError::InUse(path.to_owned())),
        // Someone who is too busy to take connections, or whom we may not connect to, is someone.
        Err(_) => Err(SocketError::InUse(path.to_owned())),
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

    #[test]
    fn socket_is_its_users_alone_and_goes_when_it_is_done() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api");
        let socket = ApiSocket::bind(&path).unwrap();
        let mode = path.symlink_metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        assert!(matches!(ApiSocket::bind(&path), Err(SocketError::InUse(_))));
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn socket_left_behind_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api");
        drop(UnixListener::bind(&path).unwrap());
        let _socket = ApiSocket::bind(&path).unwrap();
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
            assert!(matches!(
                ApiSocket::bind(path),
                Err(SocketError::NotASocket(_))
            ));
        }
        assert_eq!(fs::read_to_string(file).unwrap(), "precious");
        assert!(!target.exists());
        // Nor is a link to a socket that nobody listens on followed.
        drop(UnixListener::bind(&target).unwrap());
        assert!(ApiSocket::bind(&link).is_err());
        assert!(target.exists());
    }

    #[test]
    fn what_took_its_place_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api");
        let socket = ApiSocket::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "another's").unwrap();
        drop(socket);
        assert_eq!(fs::read_to_string(&path).unwrap(), "another's");
    }
}
