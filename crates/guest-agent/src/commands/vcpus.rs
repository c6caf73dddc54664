//! `guest-get-vcpus` and `guest-set-vcpus`.

use guest_protocol::Error;
use guest_protocol::answers::Vcpu;
use guest_protocol::arguments::VcpuWish;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::path::Path;

const FOLDER: &str = "/sys/devices/system/cpu";

/// The processors that the kernel shows below `root`, which is `/` but in tests, in its order.
pub(super) fn vcpus(root: &Path) -> Result<Vec<Vcpu>, Error> {
    let folder = std::fs::read_dir(in_root(root, FOLDER));
    let folder = folder.map_err(|error| {
        Error::generic(format!("failed to list entries: {FOLDER}: {}", crate::words(&error)))
    })?;
    let mut vcpus = Vec::new();
    for entry in folder.filter_map(Result::ok) {
        if let Some(logical_id) = entry.file_name().to_str().and_then(number) {
            let online = switch(root, logical_id, None)?;
            vcpus.push(Vcpu { logical_id, online: online.unwrap_or(true), can_offline: online.is_some() });
        }
    }
    Ok(vcpus)
}

/// Makes processors what they are to be, in order, up to the first that cannot be. Answers how many are; that none is,
/// is an error.
pub(super) fn set(root: &Path, wishes: &[VcpuWish]) -> Result<i64, Error> {
    for (done, wish) in wishes.iter().enumerate() {
        let set = switch(root, wish.logical_id, Some(wish.online)).and_then(|switched| match switched {
            None if !wish.online => {
                Err(Error::generic(format!("logical processor #{} can't be offlined", wish.logical_id)))
            }
            _ => Ok(()),
        });
        match set {
            Ok(()) => {}
            Err(error) if done == 0 => return Err(error),
            Err(_) => return Ok(i64::try_from(done).unwrap_or(i64::MAX)),
        }
    }
    Ok(i64::try_from(wishes.len()).unwrap_or(i64::MAX))
}

/// Only `cpu` and a number is a processor.
fn number(name: &str) -> Option<i64> {
    let digits = name.strip_prefix("cpu")?;
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())?
}

/// Reads a processor's switch, after setting it if it is to be something else. `None`: it has none, and is online.
fn switch(root: &Path, number: i64, wish: Option<bool>) -> Result<Option<bool>, Error> {
    let path = format!("{FOLDER}/cpu{number}/");
    let failed =
        |what: String, errno: Errno| Error::generic(format!("{what}: {}", crate::words(&errno.into())));
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = rustix::fs::open(in_root(root, &path), flags, Mode::empty())
        .map_err(|errno| failed(format!("Could not open '{path}'"), errno))?;
    let access = if wish.is_some() { OFlags::RDWR } else { OFlags::RDONLY };
    let file = match rustix::fs::openat(&folder, "online", access | OFlags::CLOEXEC, Mode::empty()) {
        Ok(file) => file,
        Err(Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(failed(format!("open(\"{path}/online\")"), errno)),
    };
    let mut byte = [0];
    match rustix::io::pread(&file, &mut byte, 0) {
        Ok(0) => return Err(Error::generic(format!("pread(\"{path}/online\"): unexpected EOF"))),
        Ok(_) => {}
        Err(errno) => return Err(failed(format!("pread(\"{path}/online\")"), errno)),
    }
    let is_online = byte[0] != b'0';
    match wish {
        Some(wish) if wish != is_online => {
            rustix::io::pwrite(&file, if wish { b"1" } else { b"0" }, 0)
                .map_err(|errno| failed(format!("pwrite(\"{path}/online\")"), errno))?;
            Ok(Some(wish))
        }
        _ => Ok(Some(is_online)),
    }
}

fn in_root(root: &Path, path: &str) -> std::path::PathBuf {
    root.join(path.trim_start_matches('/'))
}

#[cfg(test)]
mod tests {
    use super::{set, vcpus};
    use guest_protocol::arguments::VcpuWish;
    use std::path::Path;

    fn guest() -> tempfile::TempDir {
        let guest = tempfile::tempdir().expect("a folder");
        for (cpu, online) in
            [("cpu0", None), ("cpu1", Some("1\n")), ("cpu2", Some("0\n")), ("cpu10", Some("1\n"))]
        {
            let folder = guest.path().join("sys/devices/system/cpu").join(cpu);
            std::fs::create_dir_all(&folder).expect("a folder");
            if let Some(online) = online {
                std::fs::write(folder.join("online"), online).expect("written");
            }
        }
        for other in ["cpufreq", "cpuidle", "cpu", "hotplug"] {
            std::fs::create_dir(guest.path().join("sys/devices/system/cpu").join(other)).expect("a folder");
        }
        guest
    }

    fn told(root: &Path) -> Vec<(i64, bool, bool)> {
        let mut told: Vec<_> = vcpus(root)
            .expect("processors")
            .into_iter()
            .map(|vcpu| (vcpu.logical_id, vcpu.online, vcpu.can_offline))
            .collect();
        told.sort_unstable();
        told
    }

    fn wish(logical_id: i64, online: bool) -> VcpuWish {
        VcpuWish { logical_id, online }
    }

    #[test]
    fn processors_are_told_with_their_switches() {
        assert_eq!(
            told(guest().path()),
            [(0, true, false), (1, true, true), (2, false, true), (10, true, true)]
        );
        let error = vcpus(Path::new("/nope")).expect_err("no processors");
        assert_eq!(error.desc, "failed to list entries: /sys/devices/system/cpu: No such file or directory");
    }

    #[test]
    fn processors_are_switched_up_to_the_first_that_cannot_be() {
        let guest = guest();
        let set = |wishes: &[VcpuWish]| set(guest.path(), wishes).map_err(|error| error.desc);
        assert_eq!(set(&[wish(0, true), wish(2, true), wish(1, false)]), Ok(3));
        assert_eq!(told(guest.path())[1..3], [(1, false, true), (2, true, true)]);
        assert_eq!(set(&[wish(1, true), wish(0, false), wish(2, false)]), Ok(1));
        assert_eq!(told(guest.path())[1..3], [(1, true, true), (2, true, true)]);
        assert_eq!(set(&[wish(0, false)]), Err("logical processor #0 can't be offlined".to_owned()));
        assert_eq!(
            set(&[wish(7, true)]),
            Err("Could not open '/sys/devices/system/cpu/cpu7/': No such file or directory".to_owned())
        );
        assert_eq!(set(&[]), Ok(0));
    }
}
