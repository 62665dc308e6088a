//! What the control groups of this process allow it in memory.
//!
//! Invariant: every group from the process's own to the root of what is mounted is asked, in both
//! versions of the hierarchy, and the least answer counts; what cannot be read is no limit. Called
//! by `machine`, which knows the machine's memory.
//!
//! Reads below a root that tests choose: `proc/self/cgroup` says in which groups the process is,
//! `proc/self/mountinfo` where their directories are. A container may see a part of the hierarchy,
//! its own group as the root of it, or the whole of the host's.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// A hierarchy that can limit memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

impl Version {
    /// The files of a group that hold a limit: a hard one, and one above which the kernel slows
    /// the process down rather than give it more.
    fn files(self) -> &'static [&'static str] {
        match self {
            Version::V1 => &["memory.limit_in_bytes"],
            Version::V2 => &["memory.max", "memory.high"],
        }
    }
}

/// A mounted hierarchy.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    version: Version,
    /// The group that is the root of what is mounted.
    root: PathBuf,
    /// Where its directory is.
    point: PathBuf,
}

/// The least limit on memory of this process's groups, in bytes, with `/` at `root`; `None` if no
/// group is found that says one.
pub(crate) fn memory_limit_bytes(root: &Path) -> Option<u64> {
    let read = |name: &str| fs::read(root.join(name)).unwrap_or_default();
    let groups = groups(&String::from_utf8_lossy(&read("proc/self/cgroup")));
    let mounts = mounts(&read("proc/self/mountinfo"));
    let limits = groups.iter().flat_map(|(version, group)| {
        directories(*version, group, &mounts).into_iter().map(|(top, own)| {
            let below = |path: &Path| root.join(path.strip_prefix("/").unwrap_or(path));
            limit_between(*version, &below(&top), &below(&own))
        })
    });
    limits.flatten().min()
}

/// The groups of the process that can limit its memory, from `/proc/self/cgroup`: lines of number,
/// controllers, path. The second version has no controllers there.
fn groups(text: &str) -> Vec<(Version, PathBuf)> {
    let parse = |line: &str| {
        let mut fields = line.splitn(3, ':').skip(1);
        let controllers = fields.next()?;
        let path = fields.next()?;
        // A group that was removed under its process keeps its limits, and has no directory.
        let path = path.strip_suffix(" (deleted)").unwrap_or(path);
        let version = match controllers {
            "" => Version::V2,
            named if named.split(',').any(|name| name == "memory") => Version::V1,
            _ => return None,
        };
        Some((version, PathBuf::from(path)))
    };
    text.lines().filter_map(parse).collect()
}

/// The mounted hierarchies, from `/proc/self/mountinfo`.
fn mounts(text: &[u8]) -> Vec<Mount> {
    text.split(|&byte| byte == b'\n').filter_map(mount).collect()
}

/// One line of it: `36 35 98:0 /root /point options optional... - type source super-options`.
fn mount(line: &[u8]) -> Option<Mount> {
    let fields: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
    let dash = fields.iter().position(|&field| field == b"-")?;
    let version = match *fields.get(dash + 1)? {
        b"cgroup2" => Version::V2,
        b"cgroup" => {
            let options = fields.get(dash + 3)?;
            options.split(|&byte| byte == b',').find(|&option| option == b"memory")?;
            Version::V1
        }
        _ => return None,
    };
    Some(Mount { version, root: unescaped(fields.get(3)?), point: unescaped(fields.get(4)?) })
}

/// A path of `mountinfo`, where blanks and the like are `\` and three octal digits.
fn unescaped(field: &[u8]) -> PathBuf {
    let mut path = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, after @ ..] = rest {
        let digits = after.get(..3).filter(|_| *first == b'\\');
        let code =
            digits.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        path.push(code.unwrap_or(*first));
        rest = if code.is_some() { &after[3..] } else { after };
    }
    OsString::from_vec(path).into()
}

/// Where the group's own directory is, each with the top of what is mounted there.
fn directories(version: Version, group: &Path, mounts: &[Mount]) -> Vec<(PathBuf, PathBuf)> {
    let mounts: Vec<_> = mounts.iter().filter(|mount| mount.version == version).collect();
    let seen = |mount: &&Mount| {
        let below = group.strip_prefix(&mount.root).ok()?;
        Some((mount.point.clone(), mount.point.join(below)))
    };
    let found: Vec<_> = mounts.iter().filter_map(seen).collect();
    if !found.is_empty() {
        return found;
    }
    // The group lies outside of what this process sees, or is named from somewhere else: what is
    // mounted for it is the nearest there is.
    mounts.iter().map(|mount| (mount.point.clone(), mount.point.clone())).collect()
}

/// The least limit of the groups from `own` up to `top`, in bytes.
fn limit_between(version: Version, top: &Path, own: &Path) -> Option<u64> {
    let path = own.ancestors().take_while(|directory| directory.starts_with(top));
    let limits = path.flat_map(|directory| version.files().iter().map(|file| directory.join(file)));
    let limits = limits.filter_map(|file| fs::read_to_string(file).ok()?.trim().parse().ok());
    // In the first version the kernel counts what is above too, seen or not.
    let statistics = fs::read_to_string(own.join("memory.stat")).unwrap_or_default();
    limits.chain(hierarchical_limit(&statistics)).min()
}

/// What the group and all above it allow, from `memory.stat` of the first version.
fn hierarchical_limit(statistics: &str) -> Option<u64> {
    let value = |line: &str| line.strip_prefix("hierarchical_memory_limit ")?.trim().parse().ok();
    statistics.lines().find_map(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const UNLIMITED_V1: &str = "9223372036854771712\n";

    /// A root with these files.
    fn tree(files: &[(&str, String)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    fn limit(files: &[(&str, String)]) -> Option<u64> {
        memory_limit_bytes(tree(files).path())
    }

    fn v2_mount(root: &str, point: &str) -> String {
        format!("30 23 0:26 {root} {point} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n")
    }

    fn v1_mount(root: &str, point: &str) -> String {
        let memory = format!("41 30 0:36 {root} {point} rw shared:12 - cgroup cgroup rw,memory\n");
        format!("40 30 0:35 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n{memory}")
    }

    fn bytes(mib: u64) -> String {
        format!("{}\n", mib * MIB)
    }

    #[test]
    fn a_limit_of_a_nested_v2_group_counts_wherever_it_is_set() {
        let base = "sys/fs/cgroup/system.slice/service.scope";
        for limited in ["system.slice", "system.slice/service.scope", ""] {
            let file = format!("sys/fs/cgroup/{limited}/memory.max");
            let found = limit(&[
                ("proc/self/cgroup", "0::/system.slice/service.scope\n".into()),
                ("proc/self/mountinfo", v2_mount("/", "/sys/fs/cgroup")),
                (&format!("{base}/memory.max"), "max\n".into()),
                (&format!("{base}/memory.high"), "max\n".into()),
                (&file, bytes(512)),
            ]);
            assert_eq!(found, Some(512 * MIB), "set at {limited:?}");
        }
    }

    #[test]
    fn the_least_of_all_v2_limits_counts() {
        let files = |high: u64| {
            limit(&[
                ("proc/self/cgroup", "0::/a/b\n".into()),
                ("proc/self/mountinfo", v2_mount("/", "/sys/fs/cgroup")),
                ("sys/fs/cgroup/a/memory.max", bytes(700)),
                ("sys/fs/cgroup/a/b/memory.max", bytes(900)),
                ("sys/fs/cgroup/a/b/memory.high", bytes(high)),
                // Of a group that the process is not in.
                ("sys/fs/cgroup/c/memory.max", bytes(1)),
                ("sys/fs/cgroup/a/b/c/memory.max", bytes(1)),
            ])
        };
        assert_eq!(files(800), Some(700 * MIB));
        assert_eq!(files(300), Some(300 * MIB), "beyond memory.high it crawls");
    }

    #[test]
    fn a_v1_limit_counts_at_any_height() {
        let base = "sys/fs/cgroup/memory";
        for (own, above) in [(bytes(64), UNLIMITED_V1.into()), (UNLIMITED_V1.into(), bytes(64))] {
            let found = limit(&[
                ("proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/jobs/one\n0::/\n".into()),
                ("proc/self/mountinfo", v1_mount("/", "/sys/fs/cgroup/memory")),
                (&format!("{base}/jobs/one/memory.limit_in_bytes"), own),
                (&format!("{base}/jobs/memory.limit_in_bytes"), above),
                (&format!("{base}/memory.limit_in_bytes"), UNLIMITED_V1.into()),
            ]);
            assert_eq!(found, Some(64 * MIB));
        }
    }

    /// The container sees its own group as the top of what is mounted; only the statistics tell
    /// what the groups above allow.
    #[test]
    fn a_v1_container_learns_what_is_allowed_above_its_view() {
        let statistics = format!("cache 7\nhierarchical_memory_limit {}\n", 96 * MIB);
        let found = limit(&[
            ("proc/self/cgroup", "4:memory:/docker/abc\n".into()),
            ("proc/self/mountinfo", v1_mount("/docker/abc", "/sys/fs/cgroup/memory")),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", bytes(128)),
            ("sys/fs/cgroup/memory/memory.stat", statistics),
        ]);
        assert_eq!(found, Some(96 * MIB));
    }

    #[test]
    fn a_container_with_a_partial_view_finds_its_own_limit() {
        // Its group is the root of its namespace; or it is named from outside of the mount; or the
        // host's whole tree is mounted into it.
        for (group, root, file) in [
            ("/", "/", "memory.max"),
            ("/docker/abc", "/docker/abc", "memory.max"),
            ("/../other", "/", "memory.max"),
            ("/kubepods/pod1/abc", "/", "kubepods/pod1/memory.max"),
            ("/docker/abc (deleted)", "/", "docker/memory.max"),
        ] {
            let found = limit(&[
                ("proc/self/cgroup", format!("0::{group}\n")),
                ("proc/self/mountinfo", v2_mount(root, "/sys/fs/cgroup")),
                (&format!("sys/fs/cgroup/{file}"), bytes(256)),
            ]);
            assert_eq!(found, Some(256 * MIB), "{group} below {root}");
        }
    }

    #[test]
    fn both_versions_count_where_both_are_mounted() {
        let mounts = v1_mount("/", "/sys/fs/cgroup/memory") + &v2_mount("/", "/sys/fs/cgroup/u");
        let found = limit(&[
            ("proc/self/cgroup", "4:memory:/one\n0::/two\n".into()),
            ("proc/self/mountinfo", mounts),
            ("sys/fs/cgroup/memory/one/memory.limit_in_bytes", bytes(512)),
            ("sys/fs/cgroup/u/two/memory.max", bytes(256)),
        ]);
        assert_eq!(found, Some(256 * MIB));
    }

    #[test]
    fn unreadable_file_is_no_limit() {
        assert_eq!(limit(&[]), None);
        let torn = b"30 23 0:26\n30 23 0:26 / /x rw - cgroup2\n\xff - cgroup\n30 - cgroup2\n";
        assert!(mounts(torn).len() <= 1);
        for text in ["", ":", "0:", "0::", "no colons", "1:memory", "\u{fffd}::/x"] {
            groups(text);
        }
        let hopeless = limit(&[
            ("proc/self/cgroup", "0::/a\n".into()),
            ("proc/self/mountinfo", v2_mount("/", "/sys/fs/cgroup")),
            ("sys/fs/cgroup/a/memory.max", "max\n".into()),
            ("sys/fs/cgroup/a/memory.high", "-1\n".into()),
        ]);
        assert_eq!(hopeless, None);
    }

    #[test]
    fn blanks_in_the_path_of_a_mount_are_understood() {
        let line = v2_mount("/a\\040b", "/mnt/x\\134y\\0");
        let mounts = mounts(line.as_bytes());
        assert_eq!(mounts[0].root, Path::new("/a b"));
        assert_eq!(mounts[0].point, Path::new("/mnt/x\\y\\0"));
    }
}
