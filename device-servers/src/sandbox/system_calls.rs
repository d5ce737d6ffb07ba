//! seccomp: the system calls that a server needs.
//!
//! The lists were made by watching the servers (`strace -f`), and of what the standard library calls besides. Whatever is
//! called often is allowed whatever its arguments are, so that the kernel knows without running the filter.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter,
};

use super::Role;

/// What every server needs: the standard library, and the library that servers are written with.
const EVERY: &[c_long] = &[
    // Memory.
    libc::SYS_brk,
    libc::SYS_ftruncate,
    libc::SYS_madvise,
    libc::SYS_memfd_create,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // Threads, and the end of them and of the process.
    libc::SYS_clone3,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    // Time, and chance for hash tables.
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_getrandom,
    // Descriptors: files, eventfds, the log.
    libc::SYS_close,
    libc::SYS_eventfd2,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_lseek,
    libc::SYS_newfstatat,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_read,
    libc::SYS_statx,
    libc::SYS_write,
    libc::SYS_writev,
    // The connection. Only who was listening before has something to accept from.
    libc::SYS_accept4,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
];

/// What every server needs, but not all of it.
const EVERY_IF: &[Only] = &[
    // Threads, and no processes.
    Only::masked(libc::SYS_clone, 0, libc::CLONE_THREAD, libc::CLONE_THREAD),
    Only::value(libc::SYS_prctl, 0, libc::PR_SET_NAME),
    // A panic's abort.
    Only::value(libc::SYS_tgkill, 2, libc::SIGABRT),
    // Memory that is no code.
    Only::masked(libc::SYS_mmap, 2, libc::PROT_EXEC, 0),
    Only::masked(libc::SYS_mprotect, 2, libc::PROT_EXEC, 0),
    // A socket that does not block, and the twin socket.
    Only::ioctl(libc::FIONBIO),
    Only::value(libc::SYS_socketpair, 0, libc::AF_UNIX),
];

/// What a disk needs besides.
const DISK: &[c_long] = &[
    libc::SYS_fadvise64,
    libc::SYS_fdatasync,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_pwritev2,
];

/// What a network card needs besides: packets, and the netlink socket that tells of the tap's link.
const NET: &[c_long] = &[libc::SYS_readv, libc::SYS_recvfrom, libc::SYS_sendto];
const NET_IF: &[Only] = &[
    Only::ioctl(libc::TUNSETOFFLOAD),
    Only::ioctl(libc::TUNSETQUEUE),
];

/// A system call that is allowed if some bits of an argument have a certain value.
struct Only {
    call: c_long,
    /// From 0.
    argument: u8,
    mask: u64,
    value: u64,
}

impl Only {
    /// Only with this value, as an argument of 32 bits.
    const fn value(call: c_long, argument: u8, value: i32) -> Self {
        Self {
            call,
            argument,
            mask: u32::MAX as u64,
            value: value.cast_unsigned() as u64,
        }
    }

    /// Only this request.
    const fn ioctl(request: libc::Ioctl) -> Self {
        Self {
            call: libc::SYS_ioctl,
            argument: 1,
            mask: u32::MAX as u64,
            value: request,
        }
    }

    /// Only with these bits of this value.
    const fn masked(call: c_long, argument: u8, mask: i32, value: i32) -> Self {
        Self {
            call,
            argument,
            mask: mask.cast_unsigned() as u64,
            value: value.cast_unsigned() as u64,
        }
    }

    fn rule(&self) -> Result<SeccompRule, BackendError> {
        let is = SeccompCmpOp::MaskedEq(self.mask);
        let length = SeccompCmpArgLen::Qword;
        SeccompCondition::new(self.argument, length, is, self.value)
            .and_then(|condition| SeccompRule::new(vec![condition]))
    }
}

/// Has the process killed at its first system call that `role` has no need of.
pub(super) fn allow_only(role: Role) -> Result<(), seccompiler::Error> {
    let (absent, allowed) = (absent()?, allowed(role)?);
    apply_filter(&absent)?;
    apply_filter(&allowed)
}

fn allowed(role: Role) -> Result<BpfProgram, BackendError> {
    let (own, own_if) = match role {
        Role::Demo => ([].as_slice(), [].as_slice()),
        Role::Disk => (DISK, [].as_slice()),
        Role::Net => (NET, NET_IF),
    };
    let calls = EVERY.iter().chain(own);
    let mut rules: BTreeMap<_, _> = calls.map(|call| (*call, Vec::new())).collect();
    for only in EVERY_IF.iter().chain(own_if) {
        let alternatives: &mut Vec<_> = rules.entry(only.call).or_default();
        alternatives.push(only.rule()?);
    }
    let (others, these) = (SeccompAction::KillProcess, SeccompAction::Allow);
    SeccompFilter::new(rules, others, these, TargetArch::x86_64)?.try_into()
}

/// A filter cannot see what clone3(2) is asked for, so there is none: the C library then takes clone(2). What two filters
/// say differently is as the stricter one says.
fn absent() -> Result<BpfProgram, BackendError> {
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let errno = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
    SeccompFilter::new(rules, SeccompAction::Allow, errno, TargetArch::x86_64)?.try_into()
}
