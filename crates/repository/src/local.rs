//! A repository in a local folder, through `object_store` with fsync switched on.

use crate::{Error, Objects, background};
use object_store::local::LocalFileSystem;
use object_store::path::Path as ObjectPath;
use object_store::{MultipartUpload, ObjectStore, ObjectStoreExt, PutPayload};
use std::fs::{DirBuilder, Permissions};
use std::future::Future;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

const FOLDER_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;
/// As much is written at once.
const PART_BYTES: usize = 1 << 20;

/// Objects as files under a folder of our own.
#[derive(Debug)]
pub struct LocalObjects {
    folder: PathBuf,
    store: LocalFileSystem,
}

impl LocalObjects {
    /// Makes the folder, and those above it, private if they are missing.
    ///
    /// # Errors
    /// `Store` when that fails.
    pub fn create(folder: &Path) -> Result<LocalObjects, Error> {
        let doing = || format!("making the folder {}", folder.display());
        let folder = &std::path::absolute(folder).map_err(|e| io_error(doing(), &e))?;
        // The last of these is the parent of the first folder that was missing.
        let missing = folder.ancestors().take_while(|ancestor| !ancestor.exists()).count();
        let changed: Vec<&Path> = folder.ancestors().skip(1).take(missing).collect();
        let made = DirBuilder::new().recursive(true).mode(FOLDER_MODE).create(folder);
        // The folder may have existed, empty, with a wider mode.
        made.and_then(|()| std::fs::set_permissions(folder, Permissions::from_mode(FOLDER_MODE)))
            .and_then(|()| changed.into_iter().try_for_each(sync_folder))
            .map_err(|e| io_error(doing(), &e))?;
        LocalObjects::open(folder)
    }

    /// Uses a folder that exists.
    ///
    /// # Errors
    /// `NotARepository` when there is no such folder.
    pub fn open(folder: &Path) -> Result<LocalObjects, Error> {
        if !folder.is_dir() {
            return Err(Error::NotARepository { place: folder.to_path_buf() });
        }
        let doing = || format!("opening the folder {}", folder.display());
        let store =
            LocalFileSystem::new_with_prefix(folder).map_err(|e| store_error(doing(), &e))?.with_fsync(true);
        Ok(LocalObjects { folder: folder.to_path_buf(), store })
    }

    /// Outside of a runtime `object_store` does its work where it is polled: on the thread that asks, with the priority that this one
    /// has. A runtime's own threads would copy a pack of 32 MiB as if it were urgent, beside applications that were just thawed.
    fn run<T>(
        &self,
        doing: &str,
        name: &str,
        operation: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T, Error> {
        futures_executor::block_on(operation).map_err(|error| match error {
            object_store::Error::NotFound { .. } => Error::Missing { object: name.to_string() },
            error => store_error(format!("{doing} {name}"), &error),
        })
    }

    /// Part by part, so that a thread that gives way does so in the middle of a pack too. Nothing is there under the name until all is.
    async fn write(&self, path: &ObjectPath, bytes: PutPayload) -> object_store::Result<()> {
        // Dropped unfinished, it removes what it wrote.
        let mut upload = self.store.put_multipart(path).await?;
        for whole in bytes {
            for from in (0..whole.len()).step_by(PART_BYTES) {
                let began = Instant::now();
                let part = whole.slice(from..whole.len().min(from + PART_BYTES));
                upload.put_part(part.into()).await?;
                background::breathe(began.elapsed());
            }
        }
        upload.complete().await.map(drop)
    }

    /// `object_store` makes files and folders by the process's umask, which is not ours to change. The repository's
    /// folder is private, so nobody sees them before their own modes are.
    fn make_private(&self, name: &str) -> io::Result<()> {
        let mut path = self.folder.clone();
        let mut components = name.split('/').peekable();
        while let Some(component) = components.next() {
            path.push(component);
            let mode = if components.peek().is_some() { FOLDER_MODE } else { FILE_MODE };
            std::fs::set_permissions(&path, Permissions::from_mode(mode))?;
        }
        Ok(())
    }
}

impl Objects for LocalObjects {
    fn put(&self, name: &str, bytes: PutPayload) -> Result<(), Error> {
        self.run("writing", name, self.write(&ObjectPath::from(name), bytes))?;
        self.make_private(name).map_err(|error| io_error(format!("making {name} private"), &error))
    }

    fn get(&self, name: &str, limit: u64) -> Result<Vec<u8>, Error> {
        let path = ObjectPath::from(name);
        let read = async {
            let found = self.store.get(&path).await?;
            if found.meta.size > limit { Ok(None) } else { found.bytes().await.map(Some) }
        };
        let bytes = self.run("reading", name, read)?;
        let too_large = repository_format::FormatError::TooLarge;
        bytes.map(Vec::from).ok_or_else(|| Error::damaged(name)(too_large))
    }

    fn get_range(&self, name: &str, range: Range<u64>) -> Result<Vec<u8>, Error> {
        let path = ObjectPath::from(name);
        let read = self.run("reading", name, self.store.get_range(&path, range.clone()));
        match read {
            // A range that begins behind the end is an error to the store, and a cut object to us.
            Err(Error::Store { .. }) if self.length(name)?.is_some_and(|length| length <= range.start) => {
                Ok(Vec::new())
            }
            read => read.map(Vec::from),
        }
    }

    fn length(&self, name: &str) -> Result<Option<u64>, Error> {
        match self.run("looking for", name, self.store.head(&ObjectPath::from(name))) {
            Ok(meta) => Ok(Some(meta.size)),
            Err(Error::Missing { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn list(&self, folder: &str) -> Result<Vec<String>, Error> {
        let path = ObjectPath::from(folder);
        let listing = async {
            let mut names = Vec::new();
            let mut folders = vec![path];
            while let Some(path) = folders.pop() {
                let listed = self.store.list_with_delimiter(Some(&path)).await?;
                folders.extend(listed.common_prefixes);
                names.extend(listed.objects.into_iter().map(|object| object.location.to_string()));
            }
            Ok(names)
        };
        match self.run("listing", folder, listing) {
            // A folder is made with its first object.
            Err(Error::Missing { .. }) => Ok(Vec::new()),
            listed => listed,
        }
    }

    fn delete(&self, name: &str) -> Result<(), Error> {
        match self.run("deleting", name, self.store.delete(&ObjectPath::from(name))) {
            Ok(()) => {}
            Err(Error::Missing { .. }) => return Ok(()),
            Err(error) => return Err(error),
        }
        // `object_store` does not make deletions durable; a manifest that comes back after a power failure
        // would surprise people who deleted it.
        let path = self.folder.join(name);
        let parent = path.parent().unwrap_or(&self.folder);
        sync_folder(parent).map_err(|error| io_error(format!("deleting {name}"), &error))
    }
}

/// Makes the names in a folder durable.
fn sync_folder(folder: &Path) -> io::Result<()> {
    std::fs::File::open(folder)?.sync_all()
}

/// Names the failure, and recognises a full disk or quota wherever it is wrapped.
fn store_error(doing: String, error: &(dyn std::error::Error + 'static)) -> Error {
    let mut source = Some(error);
    let mut innermost = error;
    while let Some(error) = source {
        if let Some(io) = error.downcast_ref::<io::Error>()
            && is_full(io)
        {
            return Error::StoreFull { doing };
        }
        innermost = error;
        source = error.source();
    }
    Error::Store { doing, cause: Arc::from(innermost.to_string()) }
}

fn io_error(doing: String, error: &io::Error) -> Error {
    if is_full(error) {
        Error::StoreFull { doing }
    } else {
        Error::Store { doing, cause: Arc::from(error.to_string()) }
    }
}

fn is_full(error: &io::Error) -> bool {
    // `source` of an error that wraps another passes over the wrapped one itself.
    let wrapped = error.get_ref().and_then(|inner| inner.downcast_ref::<io::Error>());
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
        || wrapped.is_some_and(is_full)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_recognised_however_deep_it_is_wrapped() {
        for kind in [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded] {
            let inner = io::Error::other(io::Error::from(kind));
            let wrapped = object_store::Error::Generic { store: "local", source: Box::new(inner) };
            assert!(matches!(store_error("writing".into(), &wrapped), Error::StoreFull { .. }));
        }
        let other = io::Error::from(io::ErrorKind::PermissionDenied);
        let wrapped = object_store::Error::Generic { store: "local", source: Box::new(other) };
        let Error::Store { cause, .. } = store_error("writing".into(), &wrapped) else {
            panic!("taken for full")
        };
        assert_eq!(&*cause, "permission denied");
    }
}
