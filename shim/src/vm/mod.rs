//! A machine on KVM.
//!
//! | module | what |
//! |---|---|
//! | [`kvm`] | what the host's KVM can do, and the calls that kvm-ioctls has not got |
//! | [`cpu`] | what a guest is told of its processors; baselines; whether a host can run what a guest was told |
//! | [`vcpu`] | a thread for each processor: running, pausing, slowing down |
//! | [`state`] | the state of processors, interrupt controllers, timer and clock, and the order in which it is put back |
//! | [`machine`] | all of it together, as [`crate::machine`] wants it |
//! | [`host`] | makes machines for migrations that come in |
//! | [`boot`] | Linux kernels: bzImage and ELF with a PVH note |

pub mod boot;
pub mod cpu;
pub mod host;
pub mod kvm;
pub mod machine;
pub mod ports;
pub mod state;
pub mod vcpu;
