//! The parts of a machine that are made before its saved file is known.
//!
//! The VM in KVM, the sandbox and the control socket do not depend on that file. So a process that waits for `migrate-incoming`
//! (`control::deferred`) makes them meanwhile, and the client that names the file waits less. The builder takes them from here. In any
//! other process this value is empty: then the same methods make each part when the builder comes to it.

use crate::binary_pages;
use crate::config::VmConfig;
use crate::control::{self, ControlServer};
use crate::error::Error;
use crate::kvm::EmptyVm;
use crate::sandbox::Sandbox;

/// The parts that were made in the wait for the file, if there was one.
#[derive(Default)]
pub(crate) struct EarlyParts {
    /// The control socket on which the file was named.
    pub(crate) control: Option<ControlServer>,
    pub(crate) empty_vm: Option<EmptyVm>,
    pub(crate) sandbox: Option<Sandbox>,
}

impl EarlyParts {
    /// Gives back pages of the binary, unless the wait has done that.
    pub(crate) fn release_binary_pages(&self) {
        if self.empty_vm.is_none() {
            binary_pages::release();
        }
    }

    /// The confinement of `config`. The one that was prepared in the wait is used if it fits.
    ///
    /// # Errors
    /// Those of [`Sandbox::prepare`].
    pub(crate) fn sandbox(&mut self, config: &VmConfig) -> Result<Sandbox, Error> {
        let prepared = self.sandbox.take().filter(|sandbox| sandbox.fits(config));
        prepared.map_or_else(|| Sandbox::prepare(config), Ok)
    }

    /// A VM without memory.
    ///
    /// # Errors
    /// Those of [`EmptyVm::new`].
    pub(crate) fn empty_vm(&mut self) -> Result<EmptyVm, Error> {
        self.empty_vm.take().map_or_else(EmptyVm::new, Ok)
    }

    /// The control socket. `None`: `config` has none.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub(crate) fn control(&mut self, config: &VmConfig) -> Result<Option<ControlServer>, Error> {
        match self.control.take() {
            None => config.qmp.as_deref().map(|path| control::listen(path, config)).transpose(),
            control => Ok(control),
        }
    }
}
