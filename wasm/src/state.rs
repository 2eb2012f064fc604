//! What a store holds besides the program's own memory.

use std::sync::Arc;

use wasmtime::Store;
use wasmtime::component::ResourceTable;
use wasmtime_wasi::p1::WasiP1Ctx;
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};
use wasmtime_wasi_http::{WasiHttpCtx, WasiHttpCtxView, WasiHttpView};

use crate::client::Client;
use crate::config::MAX_RESOURCES;
use crate::control::Control;
use crate::limits::{StoreLimits, Usage};
use crate::names::Resolver;

/// What both kinds of store have.
#[derive(Debug)]
pub(crate) struct Common {
    pub(crate) limits: StoreLimits,
    pub(crate) control: Arc<Control>,
}

impl Common {
    pub(crate) fn new(usage: &Arc<Usage>, control: &Arc<Control>) -> Self {
        Self {
            limits: StoreLimits::new(Arc::clone(usage)),
            control: Arc::clone(control),
        }
    }
}

pub(crate) trait HasCommon: Send + 'static {
    fn common(&mut self) -> &mut Common;
}

/// Of a core module with WASI preview 1.
pub(crate) struct CoreState {
    pub(crate) wasi: WasiP1Ctx,
    pub(crate) common: Common,
}

impl HasCommon for CoreState {
    fn common(&mut self) -> &mut Common {
        &mut self.common
    }
}

/// Of a component.
pub(crate) struct ComponentState {
    wasi: WasiCtx,
    table: ResourceTable,
    http: WasiHttpCtx,
    client: Client,
    common: Common,
}

impl ComponentState {
    pub(crate) fn new(
        wasi: WasiCtx,
        common: Common,
        resolver: Arc<Resolver>,
        network: bool,
    ) -> Self {
        let mut table = ResourceTable::new();
        table.set_max_capacity(MAX_RESOURCES);
        Self {
            wasi,
            table,
            http: WasiHttpCtx::new(),
            client: Client::new(resolver, network),
            common,
        }
    }

    pub(crate) fn resolver(&self) -> Arc<Resolver> {
        Arc::clone(self.client.resolver())
    }

    pub(crate) fn table(&mut self) -> &mut ResourceTable {
        &mut self.table
    }
}

impl HasCommon for ComponentState {
    fn common(&mut self) -> &mut Common {
        &mut self.common
    }
}

impl WasiView for ComponentState {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView {
            ctx: &mut self.wasi,
            table: &mut self.table,
        }
    }
}

impl WasiHttpView for ComponentState {
    fn http(&mut self) -> WasiHttpCtxView<'_> {
        WasiHttpCtxView {
            hooks: &mut self.client,
            table: &mut self.table,
            ctx: &mut self.http,
        }
    }
}

/// Makes a store that obeys its limits and its owner.
pub(crate) fn store<T: HasCommon>(
    engine: &wasmtime::Engine,
    state: T,
    fuel: Option<u64>,
) -> wasmtime::Result<Store<T>> {
    let mut store = Store::new(engine, state);
    store.limiter(|state| &mut state.common().limits);
    if let Some(fuel) = fuel {
        store.set_fuel(fuel)?;
    }
    store.set_epoch_deadline(1);
    store.epoch_deadline_callback(|mut store| {
        let control = Arc::clone(&store.data_mut().common().control);
        Ok(control.tick())
    });
    Ok(store)
}
