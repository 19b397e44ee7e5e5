//! What the kernel says of a process's mappings: `/proc/PID/smaps`.

use anyhow::Context;

/// Fields that count memory in huge pages: anonymous, of a memfd, of hugetlbfs.
const HUGE: [&str; 5] =
    ["AnonHugePages:", "ShmemPmdMapped:", "FilePmdMapped:", "Shared_Hugetlb:", "Private_Hugetlb:"];

/// `123 kB` in bytes.
pub(crate) fn kib(text: &str) -> Option<u64> {
    text.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// What these fields come to, in bytes, of the mappings that are wanted by their first
/// line: addresses, permissions, file.
pub(crate) fn sum(smaps: &str, fields: &[&str], is_wanted: impl Fn(&str) -> bool) -> u64 {
    let (mut within, mut bytes) = (false, 0);
    for line in smaps.lines() {
        let first = line.split(' ').next().unwrap_or_default();
        // Fields begin with a name and a colon; mappings with addresses.
        if !first.ends_with(':') {
            within = is_wanted(line);
        } else if within && fields.contains(&first) {
            bytes += kib(&line[first.len()..]).unwrap_or(0);
        }
    }
    bytes
}

/// How much of a range of this process's memory lies in huge pages, in bytes. The kernel
/// may have made one mapping of it and of what adjoins.
pub(crate) fn huge_bytes(hva: u64, len: u64) -> anyhow::Result<u64> {
    let smaps = std::fs::read_to_string("/proc/self/smaps").context("reading /proc/self/smaps")?;
    let huge = sum(&smaps, &HUGE, |mapping| {
        addresses(mapping).is_some_and(|(start, end)| start < hva + len && end > hva)
    });
    Ok(huge.min(len))
}

/// Where a mapping starts and ends, by its first line.
fn addresses(mapping: &str) -> Option<(u64, u64)> {
    let (start, rest) = mapping.split_once('-')?;
    let end = rest.split(' ').next()?;
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "7f0000000000-7f0000400000 rw-p 00000000 00:00 0 \n\
        Size:               4096 kB\nRss:                4096 kB\n\
        AnonHugePages:      2048 kB\nPrivate_Hugetlb:       0 kB\nVmFlags: rd wr \n\
        7f0000400000-7f0000600000 rw-s 00000000 00:01 9  /memfd:guest-memory (deleted)\n\
        Rss:                1024 kB\nShmemPmdMapped:     1024 kB\n";

    #[test]
    fn fields_are_added_up_of_the_mappings_wanted() {
        assert_eq!(sum(SMAPS, &["Rss:"], |_| true), 5 << 20);
        assert_eq!(sum(SMAPS, &["Rss:"], |line| line.contains("/memfd:")), 1 << 20);
        assert_eq!(sum(SMAPS, &HUGE, |_| true), 3 << 20);
        assert_eq!(sum("", &HUGE, |_| true), 0);
        let lines = SMAPS.lines().filter_map(addresses);
        let (first, second) = (0x7f00_0000_0000, 0x7f00_0040_0000);
        assert_eq!(lines.collect::<Vec<_>>(), [(first, second), (second, 0x7f00_0060_0000)]);
    }

    /// Of what adjoins, and of other tests, there may be some.
    #[test]
    fn this_process_is_asked() {
        use vmpager_sys::memory::Mapping;
        let memory = Mapping::anonymous(4 << 20).unwrap();
        assert!(huge_bytes(memory.hva(), memory.len() as u64).unwrap() <= 4 << 20);
    }
}
