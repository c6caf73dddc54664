//! Which file systems the guest's administrator lets a freeze touch.

use super::facts::View;
use super::plan::Superblock;
use std::path::Path;

/// Most entries of a list.
const ENTRIES_MAX: usize = 1024;

/// What is to be frozen; by default everything. A superblock is left out where an entry of `exclude` names it, or entries
/// of `include` exist and none does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    include: Vec<String>,
    exclude: Vec<String>,
}

impl Selection {
    /// Adds entries, separated by commas: mount points, `/folder/*` for all that is mounted below a folder, or types.
    /// # Errors
    /// A sentence about an entry that can name nothing.
    pub fn include(&mut self, list: &str) -> Result<(), String> {
        add(&mut self.include, list)
    }

    /// The same, of what is left out.
    /// # Errors
    /// A sentence about an entry that can name nothing.
    pub fn exclude(&mut self, list: &str) -> Result<(), String> {
        add(&mut self.exclude, list)
    }

    /// Both lists as they were given.
    pub fn lists(&self) -> (String, String) {
        (self.include.join(","), self.exclude.join(","))
    }

    /// Whether a freeze may touch it.
    pub fn takes(&self, superblock: &Superblock) -> bool {
        let named = |list: &[String]| list.iter().any(|entry| names(entry, superblock));
        !named(&self.exclude) && (self.include.is_empty() || named(&self.include))
    }
}

fn add(entries: &mut Vec<String>, list: &str) -> Result<(), String> {
    for entry in list.split(',').map(str::trim_ascii).filter(|entry| !entry.is_empty()) {
        let below = entry.strip_suffix("/*").unwrap_or(entry);
        let is_path = below.starts_with('/') || entry == "/*";
        let is_type = !entry.contains('/');
        if below.contains('*') || !(is_path || is_type) {
            return Err(format!("'{entry}' is neither mount point, '/folder/*' nor type of a file system"));
        }
        if entries.len() == ENTRIES_MAX {
            return Err(format!("more than {ENTRIES_MAX} file systems are listed"));
        }
        let entry = if is_path && entry.len() > 1 { entry.trim_end_matches('/') } else { entry };
        entries.push(entry.to_owned());
    }
    Ok(())
}

fn names(entry: &str, superblock: &Superblock) -> bool {
    if !entry.starts_with('/') {
        return entry == superblock.kind;
    }
    // The administrator's paths are those of the agent's own namespace, not of some container's.
    let mut places = superblock.places.iter().filter(|place| place.view == View::Own);
    match entry.strip_suffix("/*") {
        Some(folder) => {
            let folder = Path::new(if folder.is_empty() { "/" } else { folder });
            places.any(|place| place.mountpoint != folder && place.mountpoint.starts_with(folder))
        }
        None => places.any(|place| place.mountpoint == Path::new(entry)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::plan::Place;
    use super::{Selection, View};
    use crate::freeze::plan::Superblock;

    fn superblock(kind: &str, places: &[(View, &str)]) -> Superblock {
        Superblock {
            device: "8:1".parse().expect("a number"),
            kind: kind.to_owned(),
            source: String::new(),
            read_only: false,
            places: places
                .iter()
                .map(|(view, place)| Place { view: *view, mountpoint: place.into() })
                .collect(),
            disks: Vec::new(),
            lies_on: Default::default(),
        }
    }

    #[track_caller]
    fn check(include: &str, exclude: &str, place: &str, taken: bool) {
        let mut selection = Selection::default();
        selection.include(include).expect("good entries");
        selection.exclude(exclude).expect("good entries");
        let superblock = superblock("xfs", &[(View::Own, place), (View::Process(7), "/inside")]);
        assert_eq!(selection.takes(&superblock), taken, "{include:?} {exclude:?} {place}");
    }

    #[test]
    fn everything_is_frozen_unless_it_is_excluded_or_others_are_included() {
        check("", "", "/a", true);
        check("", "/a", "/a", false);
        check("", "/a/", "/a", false);
        check("", "/a", "/a/b", true);
        check("", "/b, xfs", "/a", false);
        check("/a", "", "/a", true);
        check("/b", "", "/a", false);
        check("xfs", "/a", "/a", false);
    }

    #[test]
    fn a_folder_with_an_asterisk_names_what_is_mounted_below_it() {
        check("", "/a/*", "/a/b/c", false);
        check("", "/a/*", "/a", true);
        check("", "/a/*", "/ab", true);
        check("", "/*", "/a", false);
        check("", "/*", "/", true);
    }

    #[test]
    fn the_places_of_other_namespaces_name_nothing() {
        check("", "/inside", "/a", true);
        check("/inside", "", "/a", false);
    }
}
