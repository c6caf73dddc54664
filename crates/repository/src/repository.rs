//! A repository: made, opened, listed, and rid of snapshots.

use crate::cache::Caches;
use crate::frames::Frames;
use crate::objects::{
    CONFIG, CONFIG_BYTES_MAX, KEY_SLOT_FILE_BYTES_MAX, OBJECT_FILE_BYTES_MAX, deleted_name, list_ids,
    manifest_name, revoked_name, slot_name,
};
use crate::{DiskReader, Error, LocalObjects, Objects, Secret, Writer};
use repository_format::{
    Config, DiskRoot, FORMAT, FormatError, Identifier, Keys, LeaseId, Manifest, ManifestFile, MasterKey,
    RepositoryId, SlotId, SnapshotId, open_object, read_key_slot, seal_object, to_json, write_key_slot,
};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use zeroize::Zeroizing;

/// What differs between users of one repository.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Where the deduplication cache lives; without it `$XDG_CACHE_HOME/stillpoint/REPOSITORY`, else under `$HOME/.cache`.
    pub cache: Option<PathBuf>,
}

/// An open repository. Cheap to clone; all clones share their caches.
#[derive(Debug, Clone)]
pub struct Repository {
    pub(crate) id: RepositoryId,
    pub(crate) frames: Arc<Frames>,
    pub(crate) cache_folder: Option<PathBuf>,
}

/// A snapshot in a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// The VM's name; empty when the manifest is damaged.
    pub vm: String,
    /// Milliseconds since 1970.
    pub created_at_ms: u64,
    /// What it was compared with.
    pub parent: Option<SnapshotId>,
    /// The user's words.
    pub description: Option<String>,
    /// Name of the level.
    pub level: String,
    /// Sum of its parts' sizes.
    pub size_bytes: u64,
    /// What its writer added to the repository.
    pub stored_bytes: u64,
    /// Why nothing but the id and the time is known.
    pub damage: Option<String>,
}

impl Repository {
    /// Makes a repository in a folder that is empty or missing.
    ///
    /// # Errors
    /// `AlreadyARepository`, `FolderNotEmpty`, `StoreUnfit`; whatever the secret or the store refuse.
    pub fn init(folder: &Path, secret: &Secret) -> Result<Repository, Error> {
        let place = || folder.to_path_buf();
        if folder.join(CONFIG).exists() {
            return Err(Error::AlreadyARepository { place: place() });
        }
        if folder.exists() && !folder.read_dir().is_ok_and(|mut entries| entries.next().is_none()) {
            return Err(Error::FolderNotEmpty { place: place() });
        }
        let objects = LocalObjects::create(folder)?;
        Repository::init_in(Arc::new(objects), secret, &Options::default())
    }

    /// Opens a repository in a local folder.
    ///
    /// # Errors
    /// `NotARepository`, `UnknownFormat`, `WrongSecret`, `Damaged`.
    pub fn open(folder: &Path, secret: &Secret) -> Result<Repository, Error> {
        Repository::open_with(folder, secret, &Options::default())
    }

    /// [`Repository::open`] with options.
    ///
    /// # Errors
    /// As `open`.
    pub fn open_with(folder: &Path, secret: &Secret, options: &Options) -> Result<Repository, Error> {
        let objects = LocalObjects::open(folder)?;
        match Repository::open_in(Arc::new(objects), secret, options) {
            Err(Error::Missing { object }) if object == CONFIG => {
                Err(Error::NotARepository { place: folder.to_path_buf() })
            }
            opened => opened,
        }
    }

    /// Makes a repository in a store without objects.
    ///
    /// # Errors
    /// As [`Repository::init`].
    pub fn init_in(
        objects: Arc<dyn Objects>,
        secret: &Secret,
        options: &Options,
    ) -> Result<Repository, Error> {
        probe(&*objects)?;
        let id = RepositoryId(random()?);
        let master = MasterKey(Zeroizing::new(random()?));
        let slot = SlotId(new_id()?);
        let wrapped = secret.wrap(&*write_key_slot(id, &master))?;
        objects.put(&slot_name(slot), wrapped.into())?;
        // Last: a repository without a key must never look like one.
        let config = Config { format: FORMAT, repository: id };
        objects.put(CONFIG, to_json(&config).map_err(Error::damaged(CONFIG))?.into())?;
        Ok(Repository::assemble(id, objects, Keys::new(master), options))
    }

    /// Opens a repository in any store.
    ///
    /// # Errors
    /// As [`Repository::open`]; `Missing` for a store without `config`.
    pub fn open_in(
        objects: Arc<dyn Objects>,
        secret: &Secret,
        options: &Options,
    ) -> Result<Repository, Error> {
        let config = Config::read(&objects.get(CONFIG, CONFIG_BYTES_MAX)?).map_err(|cause| match cause {
            FormatError::UnknownFormat { found } => Error::UnknownFormat { found },
            cause => Error::Damaged { object: CONFIG.into(), cause },
        })?;
        let unlocker = secret.unlock()?;
        let mut damaged = None;
        for slot in list_ids::<SlotId>(&*objects, "keys")? {
            let name = slot_name(slot);
            match unlocker.open(&objects.get(&name, KEY_SLOT_FILE_BYTES_MAX)?) {
                Ok(Some(plaintext)) => {
                    let master =
                        read_key_slot(&plaintext, config.repository).map_err(Error::damaged(name))?;
                    return Ok(Repository::assemble(config.repository, objects, Keys::new(master), options));
                }
                Ok(None) => {}
                Err(cause) => damaged = Some(Error::Damaged { object: name, cause }),
            }
        }
        Err(damaged.unwrap_or(Error::WrongSecret { secret: unlocker.kind() }))
    }

    fn assemble(id: RepositoryId, objects: Arc<dyn Objects>, keys: Keys, options: &Options) -> Repository {
        let cache_folder =
            options.cache.clone().or_else(|| Some(default_cache_folder()?.join(id.to_string())));
        let frames = Frames { objects, keys, caches: Caches::default() };
        Repository { id, frames: Arc::new(frames), cache_folder }
    }

    /// The repository's name, the same for all who use it.
    pub fn id(&self) -> RepositoryId {
        self.id
    }

    /// Adds a key slot: afterwards this secret opens the repository, too.
    ///
    /// # Errors
    /// Whatever the secret or the store refuse.
    pub fn add_key(&self, secret: &Secret) -> Result<SlotId, Error> {
        let slot = SlotId(new_id()?);
        let wrapped = secret.wrap(&*write_key_slot(self.id, self.frames.keys.master()))?;
        self.objects().put(&slot_name(slot), wrapped.into())?;
        Ok(slot)
    }

    /// Begins a snapshot: announces a lease. Nothing is visible before the writer's `commit`.
    ///
    /// # Errors
    /// The store's.
    pub fn begin(&self) -> Result<Writer, Error> {
        Writer::begin(self)
    }

    /// All visible snapshots, oldest first. Manifests that are damaged or cannot be read are in the list and say so.
    ///
    /// # Errors
    /// The store's.
    pub fn snapshots(&self) -> Result<Vec<(SnapshotId, Summary)>, Error> {
        let revoked = list_ids::<LeaseId>(self.objects(), "revoked")?;
        let mut snapshots = Vec::new();
        for id in list_ids::<SnapshotId>(self.objects(), "manifests")? {
            match self.manifest_file(id) {
                Ok(file) if revoked.binary_search(&file.lease).is_ok() => {}
                Ok(file) => snapshots.push((id, Summary::of(&file))),
                // Deleted since it was listed.
                Err(Error::Missing { object }) if object == manifest_name(id) => {}
                Err(error) if self.concerns_one_object(&error) => {
                    snapshots.push((id, Summary::damaged(id, &error)));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(snapshots)
    }

    /// A snapshot's manifest.
    ///
    /// # Errors
    /// `NoSuchSnapshot`, `Damaged`.
    pub fn manifest(&self, id: &SnapshotId) -> Result<Manifest, Error> {
        Ok(self.visible_file(*id)?.manifest)
    }

    /// The one snapshot whose id begins with `prefix`.
    ///
    /// # Errors
    /// `NoSuchSnapshot`, `AmbiguousSnapshot`.
    pub fn find(&self, prefix: &str) -> Result<SnapshotId, Error> {
        let wanted = prefix.to_ascii_lowercase();
        let mut matches = list_ids::<SnapshotId>(self.objects(), "manifests")?;
        matches.retain(|id| !wanted.is_empty() && id.to_string().starts_with(&wanted));
        let no_such_snapshot = || Error::NoSuchSnapshot { prefix: prefix.to_string() };
        match matches[..] {
            [] => Err(no_such_snapshot()),
            [id] => match self.visible_file(id) {
                Err(Error::NoSuchSnapshot { .. }) => Err(no_such_snapshot()),
                // A damaged one is found, so that it can be verified and deleted.
                Err(error) if !self.concerns_one_object(&error) => Err(error),
                _ => Ok(id),
            },
            _ => Err(Error::AmbiguousSnapshot { prefix: prefix.to_string(), matches }),
        }
    }

    /// Deletes a snapshot. Its space returns with the next collection; no VM is touched. Of one whose manifest cannot be
    /// read no copy is kept: nobody can compare with it either.
    ///
    /// # Errors
    /// `NoSuchSnapshot`, the store's.
    pub fn delete(&self, id: &SnapshotId) -> Result<(), Error> {
        let manifest = match self.objects().get(&manifest_name(*id), OBJECT_FILE_BYTES_MAX) {
            Ok(manifest) => Some(manifest),
            Err(Error::Missing { .. }) => return Err(Error::NoSuchSnapshot { prefix: id.to_string() }),
            Err(error) if self.concerns_one_object(&error) => None,
            Err(error) => return Err(error),
        };
        // One that is repeated finds it there, and objects are written once.
        let kept = deleted_name(*id);
        if let Some(manifest) = manifest
            && self.objects().length(&kept)?.is_none()
        {
            self.objects().put(&kept, manifest.into())?;
        }
        self.objects().delete(&manifest_name(*id))
    }

    /// Reads a disk. Any number of readers, on any number of threads.
    pub fn disk(&self, root: &DiskRoot) -> DiskReader {
        DiskReader::new(Arc::clone(&self.frames), *root)
    }

    pub(crate) fn objects(&self) -> &dyn Objects {
        &*self.frames.objects
    }

    /// Whether nothing but the object that was read is at fault: its bytes are wrong, or they cannot be had (a bad sector,
    /// a file that is not ours to read) while the store still hands out `config`, which was read when it was opened.
    /// Everything else of the repository goes on without such an object.
    pub(crate) fn concerns_one_object(&self, error: &Error) -> bool {
        match error {
            Error::Damaged { .. } => true,
            Error::Store { .. } => self.objects().get(CONFIG, CONFIG_BYTES_MAX).is_ok(),
            _ => false,
        }
    }

    /// A manifest that no revocation hides.
    pub(crate) fn visible_file(&self, id: SnapshotId) -> Result<ManifestFile, Error> {
        let no_such_snapshot = || Error::NoSuchSnapshot { prefix: id.to_string() };
        let file = match self.manifest_file(id) {
            Err(Error::Missing { .. }) => return Err(no_such_snapshot()),
            file => file?,
        };
        let revoked = self.objects().length(&revoked_name(file.lease))?.is_some();
        if revoked { Err(no_such_snapshot()) } else { Ok(file) }
    }

    fn manifest_file(&self, id: SnapshotId) -> Result<ManifestFile, Error> {
        let name = manifest_name(id);
        let plaintext = self.get_sealed(&name)?;
        ManifestFile::read(&plaintext, id).map_err(Error::damaged(name))
    }

    pub(crate) fn get_sealed(&self, name: &str) -> Result<Vec<u8>, Error> {
        let sealed = self.objects().get(name, OBJECT_FILE_BYTES_MAX)?;
        open_object(&self.frames.keys, name, &sealed).map_err(Error::damaged(name))
    }

    pub(crate) fn put_sealed(&self, name: &str, what: &'static str, plaintext: &[u8]) -> Result<(), Error> {
        let sealed = seal_object(&self.frames.keys, name, random()?, plaintext);
        self.objects().put(name, sealed.map_err(|_| Error::TooLarge { what })?.into())
    }
}

impl Summary {
    fn of(file: &ManifestFile) -> Summary {
        let manifest = &file.manifest;
        Summary {
            vm: manifest.vm.clone(),
            created_at_ms: manifest.created_at_ms,
            parent: manifest.parent,
            description: manifest.description.clone(),
            level: manifest.level.clone(),
            size_bytes: manifest.parts.iter().map(|part| part.size_bytes).sum(),
            stored_bytes: file.stored_bytes,
            damage: None,
        }
    }

    fn damaged(id: SnapshotId, error: &Error) -> Summary {
        Summary {
            vm: String::new(),
            created_at_ms: id.0.at_ms(),
            parent: None,
            description: None,
            level: String::new(),
            size_bytes: 0,
            stored_bytes: 0,
            damage: Some(error.to_string()),
        }
    }
}

/// Refuses a store that does not show an object at once, by name and in its list, or does not forget it.
fn probe(objects: &dyn Objects) -> Result<(), Error> {
    let unfit = |cause: &str| Err(Error::StoreUnfit { cause: cause.to_string() });
    let name = format!("probe/{}", new_id()?);
    let content = random::<32>()?;
    objects.put(&name, content.to_vec().into())?;
    if objects.get(&name, 64)? != content || objects.get_range(&name, 8..16)? != content[8..16] {
        return unfit("an object that was just written reads differently");
    }
    if !objects.list("probe")?.contains(&name) {
        return unfit("an object that was just written is not in its listing");
    }
    objects.delete(&name)?;
    if objects.length(&name)?.is_some() || objects.list("probe")?.contains(&name) {
        return unfit("an object that was just deleted is still there");
    }
    Ok(())
}

fn default_cache_folder() -> Option<PathBuf> {
    let absolute = |variable| std::env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute());
    let caches = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    Some(caches.join("stillpoint"))
}

pub(crate) fn random<const N: usize>() -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| Error::NoRandomness { cause: error.to_string() })?;
    Ok(bytes)
}

pub(crate) fn now_ms() -> u64 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX)
}

pub(crate) fn new_id() -> Result<Identifier, Error> {
    Ok(Identifier::new(now_ms(), random()?))
}
