//! Files of a generation, read while others publish them.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::policy::files::{Unread, Wanted, read, roots};

const SWAPS: usize = 10_000;

fn contents(roots: &[PathBuf], paths: &[PathBuf]) -> Result<Vec<String>, Unread> {
    let wanted: Vec<_> = paths.iter().map(|path| Wanted { path, limit: 1024 }).collect();
    let files = read(roots, &wanted)?;
    Ok(paths.iter().map(|path| String::from_utf8(files[path].clone()).unwrap()).collect())
}

/// Publishes sets by swapping `link` in `dir`, and takes old ones away as soon as kubelet does or some later.
fn publish(dir: &Path, link: &str) {
    let mut old = Vec::new();
    for set in 0..SWAPS {
        let name = format!("..set-{set}");
        let folder = dir.join(&name);
        fs::create_dir_all(folder.join("more")).unwrap();
        for file in ["a", "b", "more/c"] {
            fs::write(folder.join(file), set.to_string()).unwrap();
        }
        symlink(&name, dir.join("new")).unwrap();
        fs::rename(dir.join("new"), dir.join(link)).unwrap();
        old.push(folder);
        while old.len() > 1 + rand::random_range(0..3) {
            fs::remove_dir_all(old.remove(0)).unwrap();
        }
    }
}

/// Whatever is read, all of it is of one set that was published.
fn swapped(dir: &Path, link: &str, roots: &[PathBuf], paths: &[PathBuf]) {
    let ends = AtomicBool::new(false);
    let began = Instant::now();
    let (mut whole, mut failed, mut last) = (0, 0, String::new());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            publish(dir, link);
            ends.store(true, Ordering::Relaxed);
        });
        while !ends.load(Ordering::Relaxed) {
            match contents(roots, paths) {
                Ok(read) => {
                    assert!(read.iter().all(|set| *set == read[0]), "{read:?}");
                    whole += u32::from(last != read[0]);
                    last.clone_from(&read[0]);
                }
                // Before the first, and where it was swapped again and again.
                Err(unread) => {
                    assert!(unread.is_absent, "{unread:?}");
                    failed += 1;
                }
            }
        }
    });
    println!("{link}: {whole} sets were read, {failed} reads failed, {:?}", began.elapsed());
    assert!(whole > 100, "{whole}");
    assert_eq!(contents(roots, paths).unwrap(), vec![(SWAPS - 1).to_string(); paths.len()]);
}

#[test]
fn each_read_is_of_one_set_of_a_config_map() {
    let dir = tempfile::tempdir().unwrap();
    for (file, target) in [("a", "..data/a"), ("b", "..data/b"), ("more", "..data/more")] {
        symlink(target, dir.path().join(file)).unwrap();
    }
    let paths = ["a", "b", "more/c"].map(|file| dir.path().join(file));
    swapped(dir.path(), "..data", &roots(paths.iter().map(PathBuf::as_path)), &paths);
}

#[test]
fn each_read_is_of_one_set_of_a_folder_that_is_swapped() {
    let dir = tempfile::tempdir().unwrap();
    let current = dir.path().join("current");
    let paths = ["a", "b", "more/c"].map(|file| current.join(file));
    swapped(dir.path(), "current", &[current], &paths);
}

#[test]
fn nothing_is_read_that_is_not_beneath() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir_all(root.join("deep")).unwrap();
    fs::create_dir_all(root.join("escaped")).unwrap();
    for file in ["secret", "root/file", "root/deep/file"] {
        fs::write(dir.path().join(file), file).unwrap();
    }
    for (target, link) in [
        ("file", "root/link"),
        ("deep/../deep/file", "root/down"),
        ("../secret", "root/up"),
        ("link-up", "root/twice"),
        ("up", "root/link-up"),
        ("loop", "root/loop"),
        ("../..", "root/escaped/..data"),
        (dir.path().join("secret").to_str().unwrap(), "root/absolute"),
        ("..", "root/folder"),
    ] {
        symlink(target, dir.path().join(link)).unwrap();
    }
    let fifo = std::process::Command::new("mkfifo").arg(root.join("fifo")).status().unwrap();
    assert!(fifo.success());
    let one = |file: &str| contents(std::slice::from_ref(&root), &[root.join(file)]);
    for file in ["file", "link", "down", "deep/file"] {
        assert!(one(file).unwrap()[0].ends_with("file"), "{file}");
    }
    for file in ["up", "twice", "absolute", "folder/secret", "escaped/secret"] {
        let unread = one(file).unwrap_err();
        assert!(unread.error.to_string().contains("leads out of its folder"), "{file}: {unread:?}");
        assert!(unread.hint.unwrap().contains("symbolic link"), "{unread:?}");
    }
    assert!(one("loop").is_err());
    for file in ["fifo", "deep"] {
        assert!(one(file).unwrap_err().error.to_string().contains("not a regular file"), "{file}");
    }
    let outside = contents(std::slice::from_ref(&root), &[dir.path().join("secret")]).unwrap_err();
    assert!(outside.error.to_string().contains("none of policies.roots"), "{outside:?}");
    let absent = one("absent").unwrap_err();
    assert!(absent.is_absent, "{absent:?}");
}

/// Guards that a state which was taken away is not read past: by their names alone files could be of another state each.
#[test]
fn where_a_state_was_taken_away_nothing_is_read() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a"), "of no state").unwrap();
    let read = || contents(&[dir.path().to_owned()], &[dir.path().join("a")]);
    assert_eq!(read().unwrap(), ["of no state"], "a folder that nobody publishes");
    symlink("..set-1", dir.path().join("..data")).unwrap();
    let unread = read().unwrap_err();
    assert!(unread.is_absent, "{unread:?}");
}

#[test]
fn roots_are_the_outermost_folders() {
    let paths = ["/b/c/x", "/a/x", "/a/y", "/b/x", "/ab/x"].map(Path::new);
    assert_eq!(roots(paths.into_iter()), ["/a", "/ab", "/b"].map(PathBuf::from));
}
