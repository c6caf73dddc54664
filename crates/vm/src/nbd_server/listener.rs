//! The private socket, and who may come in.

use super::{NbdServerError, Place, Shared, connection};
use crate::unix;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::geteuid;
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// After a failed accept, for example when no file descriptor is left.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Binds the socket. Nobody else passes the folder, so it does not matter that the mode comes after the name.
pub(super) fn bind(path: &Path, client_uid: Option<u32>) -> Result<UnixListener, NbdServerError> {
    let failed = |source| NbdServerError::Listen { path: path.to_owned(), source };
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let facts = std::fs::symlink_metadata(folder).map_err(failed)?;
    let owner_known = facts.uid() == geteuid().as_raw() || Some(facts.uid()) == client_uid;
    if !facts.is_dir() || facts.mode() & 0o077 != 0 || !owner_known {
        return Err(NbdServerError::FolderNotPrivate(folder.to_owned()));
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    restrict(path, &listener, client_uid).map_err(|source| {
        let _ = std::fs::remove_file(path); // the first error is the one to tell
        failed(source)
    })?;
    Ok(listener)
}

fn restrict(path: &Path, listener: &UnixListener, client_uid: Option<u32>) -> io::Result<()> {
    std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
    if let Some(uid) = client_uid {
        std::os::unix::fs::chown(path, Some(uid), None)?;
    }
    listener.set_nonblocking(true)
}

/// Runs until the other end of `woken` is shut.
pub(super) fn accept_until_woken(shared: &Arc<Shared>, listener: &UnixListener, woken: &UnixStream) {
    loop {
        let mut watched = [PollFd::new(listener, PollFlags::IN), PollFd::new(woken, PollFlags::IN)];
        let ready = poll(&mut watched, None);
        if !watched[1].revents().is_empty() || shared.lock().stopping {
            return;
        }
        match ready.map_err(io::Error::from).and_then(|_| listener.accept()) {
            Ok((stream, _)) => {
                // A client that fails here sees its connection closed; the server goes on.
                let _admitted = admit(shared, stream);
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(_) => std::thread::sleep(ACCEPT_RETRY),
        }
    }
}

fn admit(shared: &Arc<Shared>, stream: UnixStream) -> io::Result<()> {
    let uid = unix::peer(&stream)?.uid;
    if uid != 0 && uid != geteuid().as_raw() && Some(uid) != shared.options.client_uid {
        return Ok(());
    }
    stream.set_nonblocking(false)?;
    let Some(place) = Place::take(shared, &stream)? else { return Ok(()) };
    let serve = move || connection::serve(&place.shared, &stream);
    std::thread::Builder::new().name("nbd-connection".to_owned()).spawn(serve)?;
    Ok(())
}
