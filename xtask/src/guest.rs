//! The guest image in its cache, and the programs that are delivered into guests.

use crate::stage::{cargo, program, root};
use crate::targets;
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

const RECIPE: &str = "guest-images/debian-12-postgresql";
const TARGET: &str = "x86_64-unknown-linux-musl";

/// What a test needs to start a guest. Its text is what `vm-tests` reads from `STILLPOINT_GUEST`.
pub(crate) struct Parts {
    image: PathBuf,
    agent: PathBuf,
    load: PathBuf,
}

impl fmt::Display for Parts {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            to,
            "image={}\nagent={}\nload={}",
            self.image.display(),
            self.agent.display(),
            self.load.display()
        )
    }
}

/// Builds what is missing or older than its source; image and programs at the same time, as one mostly waits for downloads.
pub(crate) fn parts() -> Result<Parts, String> {
    let (image, programs) = std::thread::scope(|scope| {
        let image = scope.spawn(image);
        let programs = programs();
        let image = image.join().unwrap_or_else(|_| Err("the image's builder panicked".to_owned()));
        (image, programs)
    });
    let (image, programs) = (image?, programs?);
    Ok(Parts { image, agent: programs.join("stillpoint-agent"), load: programs.join("load") })
}

/// Our agent as it is delivered.
pub(crate) fn agent() -> Result<PathBuf, String> {
    Ok(programs()?.join("stillpoint-agent"))
}

/// Builds our agent and the load, static, and returns their folder.
pub(crate) fn programs() -> Result<PathBuf, String> {
    let build = [
        "build",
        "--quiet",
        "--profile",
        "agent",
        "--target",
        TARGET,
        "--package",
        "guest-agent",
        "--package",
        "load",
    ];
    has_target()?;
    cargo(&build).run()?;
    Ok(targets::folder()?.join(TARGET).join("agent"))
}

/// A toolchain that was installed otherwise than by rust-toolchain.toml may lack the target.
fn has_target() -> Result<(), String> {
    let libraries = program("rustc", &["--print", "target-libdir", "--target", TARGET]).output()?;
    if Path::new(libraries.trim()).is_dir() {
        return Ok(());
    }
    program("rustup", &["target", "add", TARGET]).run()
}

/// The folder with the image of today's recipe, built if it is not in the cache yet.
pub(crate) fn image() -> Result<PathBuf, String> {
    let images = cache()?.join("guest-images");
    fs::create_dir_all(&images).map_err(|error| format!("{}: {error}", images.display()))?;
    let image = images.join(digest()?);
    // Two checkouts may want the same image: the second waits here, and finds it.
    let lock = File::create(images.join("lock")).map_err(|error| format!("the cache's lock: {error}"))?;
    lock.lock().map_err(|error| format!("the cache's lock: {error}"))?;
    if image.is_dir() {
        return Ok(image);
    }
    let unfinished = images.join("unfinished");
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished).map_err(|error| format!("{}: {error}", unfinished.display()))?;
    }
    let build = root().join(RECIPE).join("build");
    program(&build.display().to_string(), &[&unfinished.display().to_string()]).run()?;
    forget_older(&images);
    fs::rename(&unfinished, &image).map_err(|error| format!("{}: {error}", image.display()))?;
    Ok(image)
}

/// Images are large: the four newest stay, for checkouts with different recipes side by side.
fn forget_older(images: &Path) {
    let Ok(entries) = fs::read_dir(images) else { return };
    let mut folders: Vec<(std::time::SystemTime, PathBuf)> = entries
        .flatten()
        .filter(|entry| entry.path().is_dir() && entry.file_name() != "unfinished")
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    folders.sort();
    folders.reverse();
    for (_, folder) in folders.iter().skip(3) {
        if let Err(error) = fs::remove_dir_all(folder) {
            eprintln!("an old guest image stays in {}: {error}", folder.display());
        }
    }
}

pub(crate) fn cache() -> Result<PathBuf, String> {
    let under =
        |variable: &str| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = under("XDG_CACHE_HOME").or_else(|| under("HOME").map(|home| home.join(".cache")));
    Ok(base.ok_or("neither XDG_CACHE_HOME nor HOME is set")?.join("stillpoint"))
}

/// The SHA-256 over names, modes and contents of the recipe's files, in short: another recipe is another image.
fn digest() -> Result<String, String> {
    let script =
        "find . -type f -printf '%P %m\\n' | sort; find . -type f -print0 | sort -z | xargs -0 sha256sum";
    let listed = program("sh", &["-c", &format!("cd {RECIPE} && {{ {script}; }} | sha256sum")]).output()?;
    listed
        .get(..16)
        .map(|short| format!("debian-12-postgresql-{short}"))
        .ok_or_else(|| "sha256sum printed nothing".to_owned())
}
