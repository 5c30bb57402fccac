//! The chapters about the machine, for readers of the generated documentation. No code: each module is a page of `vmm/docs/`.

#[doc = include_str!("../docs/a-kernel-boots.md")]
pub mod a_kernel_boots {}

#[doc = include_str!("../docs/kvm-in-one-page.md")]
pub mod kvm_in_one_page {}

#[doc = include_str!("../docs/stop-reset-save.md")]
pub mod stop_reset_save {}

#[doc = include_str!("../docs/control.md")]
pub mod control_of_a_running_machine {}

#[doc = include_str!("../docs/minivmm-in-ci.md")]
pub mod minivmm_in_ci {}

#[doc = include_str!("../docs/many-machines.md")]
pub mod many_machines {}

#[doc = include_str!("../docs/refused-system-calls.md")]
pub mod refused_system_calls {}

#[doc = include_str!("../docs/sandbox.md")]
pub mod what_each_thread_may_do {}

#[doc = include_str!("../docs/step-through-a-boot.md")]
pub mod step_through_a_boot {}

#[doc = include_str!("../docs/tracing.md")]
pub mod tracing {}

#[doc = include_str!("../docs/threat-model.md")]
pub mod threat_model {}
