//! What KVM counts of a vCPU (binary statistics, `KVM_GET_STATS_FD`; see
//! `Documentation/virt/kvm/api.rst`).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use kvm_ioctls::VcpuFd;
use vmpager_sys::vcpu_stats;

/// KVM's name for faults taken on the second stage of paging (of the shadow page tables,
/// where there is no second stage), emulated devices not counted.
const FAULTS: &str = "pf_taken";

/// The length of a descriptor before its name.
const DESCRIPTOR: usize = 16;

/// The most counters and the longest names that are believed; KVM has some dozens of
/// counters, with names of up to 48 bytes.
const MOST_COUNTERS: u32 = 4096;
const LONGEST_NAME: u32 = 1024;

/// How many stage-2 faults a vCPU has taken so far. `None` if this KVM does not count
/// them.
///
/// # Errors
///
/// If KVM has no such statistics (before Linux 5.14), no descriptor is left, or what KVM
/// says is not laid out as its document says.
pub fn stage2_faults(vcpu: &VcpuFd) -> io::Result<Option<u64>> {
    let stats = File::from(vcpu_stats::open(vcpu)?);
    counter(FAULTS, |bytes, at| stats.read_exact_at(bytes, at))
}

/// A counter by its name.
fn counter(
    wanted: &str,
    read: impl Fn(&mut [u8], u64) -> io::Result<()>,
) -> io::Result<Option<u64>> {
    let mut header = [0; 24];
    read(&mut header, 0)?;
    // Flags, length of names, number of counters; where their id, descriptors and values are.
    let [_, name, counters, _, descriptors, values] =
        [0, 4, 8, 12, 16, 20].map(|at| word(&header, at));
    if name > LONGEST_NAME || counters > MOST_COUNTERS {
        let what = format!("KVM's statistics have {counters} counters with names of {name} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    let mut descriptor = vec![0; DESCRIPTOR + name as usize];
    for number in 0..u64::from(counters) {
        let at = u64::from(descriptors) + number * descriptor.len() as u64;
        read(&mut descriptor, at)?;
        let name = descriptor[DESCRIPTOR..].split(|byte| *byte == 0).next();
        if name == Some(wanted.as_bytes()) {
            let mut value = [0; 8];
            read(&mut value, u64::from(values) + u64::from(word(&descriptor, 8)))?;
            return Ok(Some(u64::from_ne_bytes(value)));
        }
    }
    Ok(None)
}

/// Four bytes of what the kernel wrote.
fn word(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_ne_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Statistics with these counters, their parts in an order of their own.
    fn statistics(counters: &[(&str, u64)]) -> Vec<u8> {
        const NAME: usize = 20;
        let (values, descriptors) = (24, 24 + 8 * counters.len());
        let header = [0, NAME, counters.len(), 0, descriptors, values];
        let mut bytes: Vec<u8> =
            header.iter().flat_map(|word| u32::try_from(*word).unwrap().to_ne_bytes()).collect();
        // The last value comes first.
        bytes.extend(counters.iter().rev().flat_map(|(_, value)| value.to_ne_bytes()));
        for (number, (name, _)) in counters.iter().enumerate() {
            let mut descriptor = [0; DESCRIPTOR + NAME];
            let offset = u32::try_from(8 * (counters.len() - 1 - number)).unwrap();
            descriptor[8..12].copy_from_slice(&offset.to_ne_bytes());
            descriptor[DESCRIPTOR..][..name.len()].copy_from_slice(name.as_bytes());
            bytes.extend(descriptor);
        }
        bytes
    }

    fn find(name: &str, bytes: &[u8]) -> io::Result<Option<u64>> {
        counter(name, |into, at| {
            let at = usize::try_from(at).unwrap();
            let from = bytes.get(at..at + into.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
            into.copy_from_slice(from);
            Ok(())
        })
    }

    #[test]
    fn a_counter_is_found_by_its_whole_name() {
        let bytes = statistics(&[("pf_taken_not", 1), ("pf_taken", 1 << 40), ("pf", 3)]);
        assert_eq!(find("pf_taken", &bytes).unwrap(), Some(1 << 40));
        assert_eq!(find("pf", &bytes).unwrap(), Some(3));
        assert_eq!(find("pf_take", &bytes).unwrap(), None);
        assert_eq!(find("pf_taken", &statistics(&[])).unwrap(), None);
    }

    #[test]
    fn statistics_that_are_none_are_an_error() {
        let whole = statistics(&[("pf_taken", 7)]);
        for len in 0..whole.len() {
            assert!(find("pf_taken", &whole[..len]).is_err(), "{len} bytes");
        }
        for at in [4, 8] {
            let mut wild = whole.clone();
            wild[at..at + 4].copy_from_slice(&u32::MAX.to_ne_bytes());
            let error = find("pf_taken", &wild).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{at}");
        }
    }

    /// A vCPU that never ran has taken none.
    #[test]
    fn this_machines_kvm_is_asked() {
        let vcpu = kvm_ioctls::Kvm::new()
            .and_then(|kvm| kvm.create_vm())
            .and_then(|vm| vm.create_vcpu(0).map(|vcpu| (vm, vcpu)));
        let (_vm, vcpu) = match vcpu {
            Ok(vcpu) => vcpu,
            Err(error) => return vmpager_testing::skipped(&format!("no vCPU ({error})")),
        };
        match stage2_faults(&vcpu) {
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
                vmpager_testing::skipped("KVM has no binary statistics");
            }
            Ok(None) => vmpager_testing::skipped("KVM does not count these faults"),
            faults => assert_eq!(faults.unwrap(), Some(0)),
        }
    }
}
