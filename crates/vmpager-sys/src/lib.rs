//! The kernel ABI vmpager stands on, and nothing else: owned handles in,
//! `Result` out. Together with the KVM rooms this is the only place with
//! `unsafe` in the workspace.
//!
//! | module | kernel interface |
//! |---|---|
//! | [`uffd`] | userfaultfd(2): create, adopt, register, install, wake, read |
//! | [`memory`] | mappings of guest memory: anonymous, hugetlb, file, memfd |
//! | [`collapse`] | huge pages for memory that is in place, also of another process |
//! | [`memfd`] | sealed memfds, to share memory by descriptor |
//! | [`futex`] | sleeping on a word that processes share |
//! | [`shared`] | words of memory shared between processes through a memfd |
//! | [`file_map`] | read-only file mappings that only the kernel reads |
//! | [`ring`] | positioned reads through io_uring |
//! | [`pre_fault`] | `KVM_PRE_FAULT_MEMORY`: pages mapped for a vCPU before they are touched |
//! | [`vcpu_stats`] | `KVM_GET_STATS_FD`: what KVM counts of a vCPU |
//! | [`peer`] | unix sockets with descriptors, pidfds, what a descriptor is |
//! | [`probe`] | what this kernel and this user can do |

pub mod collapse;
pub mod file_map;
pub mod futex;
pub mod inherited;
pub mod memfd;
pub mod memory;
pub mod peer;
pub mod pre_fault;
pub mod probe;
pub mod ring;
pub mod shared;
pub mod uffd;
pub mod vcpu_stats;
