//! The debugger's side of a VM.

use std::sync::mpsc::Receiver;

use crate::error::VmError;
use crate::vm::Vm;

/// A debugger's listening socket.
#[derive(Debug)]
pub(crate) struct Debugger {
    _stops: Receiver<u8>,
}

impl Debugger {
    pub(crate) fn listen(address: &str, stops: Receiver<u8>) -> Result<Self, VmError> {
        let _ = address;
        Ok(Self { _stops: stops })
    }

    pub(crate) fn serve(self, vm: &Vm) -> Result<(), VmError> {
        vm.start()
    }
}
