//! What programs may import, and what differs from wasmtime's own implementation of it.

use std::net::IpAddr;
use std::sync::Arc;

use wasmtime::component::{Accessor, Linker as ComponentLinker, Resource, ResourceType};
use wasmtime::{
    AsContextMut, Caller, Engine, Extern, Linker, Store, StoreContextMut, WasmBacktrace,
};
use wasmtime_wasi::p1::wasi_snapshot_preview1::WasiSnapshotPreview1;
use wasmtime_wasi::p2::bindings::sockets::network::{ErrorCode, IpAddress, Network};
use wasmtime_wasi::p2::{DynPollable, Pollable, subscribe};
use wasmtime_wasi::p3::bindings::sockets::ip_name_lookup::ErrorCode as P3ErrorCode;
use wasmtime_wasi::p3::bindings::sockets::types::IpAddress as P3IpAddress;
use wasmtime_wasi::{I32Exit, WasiView, async_trait, p1, p2, p3};

use crate::names::{NameError, Resolver};
use crate::state::{ComponentState, CoreState};

/// The versions the linked interfaces have; others of the same line are matched to them.
const P2_LOOKUP: &str = "wasi:sockets/ip-name-lookup@0.2.12";
const P2_EXIT: &str = "wasi:cli/exit@0.2.12";
const P3_LOOKUP: &str = "wasi:sockets/ip-name-lookup@0.3.0";

/// WASI preview 1.
pub(crate) fn core(engine: &Engine) -> wasmtime::Result<Linker<CoreState>> {
    let mut linker = Linker::new(engine);
    p1::add_to_linker_async(&mut linker, |state: &mut CoreState| &mut state.wasi)?;
    linker.allow_shadowing(true);
    // wasmtime turns exit codes from 126 on into traps; a container's exit code is passed on.
    linker.func_wrap(
        "wasi_snapshot_preview1",
        "proc_exit",
        |caller: Caller<'_, CoreState>, code: i32| -> wasmtime::Result<()> {
            Err(ended(caller.engine(), code))
        },
    )?;
    linker.func_wrap_async("wasi_snapshot_preview1", "poll_oneoff", |caller, args| {
        Box::new(poll_oneoff(caller, args))
    })?;
    Ok(linker)
}

/// The end of a program by its own wish. wasmtime takes it for a failure and looks up which lines of
/// which files were being executed, which takes longer than a small program's whole life; but not if
/// the error has a backtrace already, as this one that is empty.
fn ended(engine: &Engine, code: i32) -> wasmtime::Error {
    let nowhere = Store::new(engine, ());
    wasmtime::Error::from(I32Exit(code)).context(WasmBacktrace::force_capture(&nowhere))
}

/// wasmtime sleeps with the thread where files may be read by it, and a sleeping thread hears of
/// no signal. Whether it may is asked of the file system's context: without one, it does not.
async fn poll_oneoff(
    mut caller: Caller<'_, CoreState>,
    (subscriptions, events, count, ready): (i32, i32, i32, i32),
) -> wasmtime::Result<i32> {
    let Some(Extern::Memory(memory)) = caller.get_export("memory") else {
        return Err(wasmtime::Error::msg("missing required memory export"));
    };
    let fuel = caller.as_context_mut().hostcall_fuel();
    let (data, state) = memory.data_and_store_mut(&mut caller);
    let mut memory = wiggle::GuestMemory::Unshared(data);
    state.wasi.set_hostcall_fuel(fuel);
    let files = std::mem::take(state.wasi.ctx().ctx.filesystem());
    let result = p1::wasi_snapshot_preview1::poll_oneoff(
        &mut state.wasi,
        &mut memory,
        subscriptions,
        events,
        count,
        ready,
    )
    .await;
    *state.wasi.ctx().ctx.filesystem() = files;
    result
}

/// WASI 0.2 and 0.3 with HTTP. wasi-nn, key-value stores and the like are not offered.
pub(crate) fn component(engine: &Engine) -> wasmtime::Result<ComponentLinker<ComponentState>> {
    let mut linker = ComponentLinker::new(engine);
    p2::add_to_linker_async(&mut linker)?;
    p3::add_to_linker(&mut linker)?;
    wasmtime_wasi_http::p2::add_only_http_to_linker_async(&mut linker)?;
    wasmtime_wasi_http::p3::add_to_linker(&mut linker)?;
    linker.allow_shadowing(true);
    lookup_p2(&mut linker)?;
    lookup_p3(&mut linker)?;
    linker.instance(P2_EXIT)?.func_wrap(
        "exit",
        |store: StoreContextMut<'_, ComponentState>,
         (status,): (Result<(), ()>,)|
         -> wasmtime::Result<()> { Err(ended(store.engine(), i32::from(status.is_err()))) },
    )?;
    linker.allow_shadowing(false);
    Ok(linker)
}

type Found = Result<std::vec::IntoIter<IpAddr>, ErrorCode>;
type Asked = std::pin::Pin<Box<dyn Future<Output = Result<Vec<IpAddr>, NameError>> + Send>>;

/// A look-up on its way. Polled by the program's own thread.
struct Lookup {
    future: Option<Asked>,
    found: Option<Found>,
}

impl Lookup {
    fn new(resolver: Arc<Resolver>, name: String) -> Self {
        Self {
            future: Some(Box::pin(async move { resolver.resolve(&name).await })),
            found: None,
        }
    }

    fn poll(&mut self, cx: &mut std::task::Context<'_>) -> std::task::Poll<&mut Found> {
        if let Some(future) = &mut self.future {
            let found = std::task::ready!(future.as_mut().poll(cx));
            self.future = None;
            self.found = Some(found.map(Vec::into_iter).map_err(|e| match e {
                NameError::Invalid => ErrorCode::InvalidArgument,
                NameError::NotFound => ErrorCode::NameUnresolvable,
                NameError::Unavailable => ErrorCode::TemporaryResolverFailure,
                NameError::NoServers => ErrorCode::PermanentResolverFailure,
            }));
        }
        std::task::Poll::Ready(
            self.found
                .get_or_insert(Err(ErrorCode::PermanentResolverFailure)),
        )
    }
}

#[async_trait]
impl Pollable for Lookup {
    async fn ready(&mut self) {
        std::future::poll_fn(|cx| self.poll(cx).map(|_| ())).await;
    }
}

fn v2(address: IpAddr) -> IpAddress {
    match address {
        IpAddr::V4(a) => IpAddress::Ipv4(a.octets().into()),
        IpAddr::V6(a) => IpAddress::Ipv6(a.segments().into()),
    }
}

fn lookup_p2(linker: &mut ComponentLinker<ComponentState>) -> wasmtime::Result<()> {
    let mut instance = linker.instance(P2_LOOKUP)?;
    instance.resource(
        "resolve-address-stream",
        ResourceType::host::<Lookup>(),
        |mut store, rep| {
            store
                .data_mut()
                .table()
                .delete(Resource::<Lookup>::new_own(rep))?;
            Ok(())
        },
    )?;
    instance.func_wrap(
        "resolve-addresses",
        |mut store: StoreContextMut<'_, ComponentState>,
         (network, name): (Resource<Network>, String)|
         -> wasmtime::Result<(Result<Resource<Lookup>, ErrorCode>,)> {
            let state = store.data_mut();
            let resolver = state.resolver();
            // The network is the permission to ask; there is nothing else to it.
            let _: &Network = state.table().get(&network)?;
            let lookup = Lookup::new(resolver, name);
            Ok((Ok(state.table().push(lookup)?),))
        },
    )?;
    instance.func_wrap(
        "[method]resolve-address-stream.resolve-next-address",
        |mut store: StoreContextMut<'_, ComponentState>,
         (lookup,): (Resource<Lookup>,)|
         -> wasmtime::Result<(Result<Option<IpAddress>, ErrorCode>,)> {
            let lookup = store.data_mut().table().get_mut(&lookup)?;
            let waker = std::task::Waker::noop();
            let mut cx = std::task::Context::from_waker(waker);
            Ok((match lookup.poll(&mut cx) {
                std::task::Poll::Pending => Err(ErrorCode::WouldBlock),
                std::task::Poll::Ready(Ok(found)) => Ok(found.next().map(v2)),
                std::task::Poll::Ready(Err(e)) => Err(*e),
            },))
        },
    )?;
    instance.func_wrap(
        "[method]resolve-address-stream.subscribe",
        |mut store: StoreContextMut<'_, ComponentState>,
         (lookup,): (Resource<Lookup>,)|
         -> wasmtime::Result<(Resource<DynPollable>,)> {
            Ok((subscribe(store.data_mut().table(), lookup)?,))
        },
    )?;
    Ok(())
}

fn lookup_p3(linker: &mut ComponentLinker<ComponentState>) -> wasmtime::Result<()> {
    linker.instance(P3_LOOKUP)?.func_wrap_concurrent(
        "resolve-addresses",
        |accessor: &Accessor<ComponentState>, (name,): (String,)| {
            Box::pin(async move {
                let resolver = accessor.with(|mut access| access.get().resolver());
                let found = resolver.resolve(&name).await;
                let found: Result<Vec<P3IpAddress>, P3ErrorCode> = found
                    .map(|list| list.into_iter().map(Into::into).collect())
                    .map_err(|e| match e {
                        NameError::Invalid => P3ErrorCode::InvalidArgument,
                        NameError::NotFound => P3ErrorCode::NameUnresolvable,
                        NameError::Unavailable => P3ErrorCode::TemporaryResolverFailure,
                        NameError::NoServers => P3ErrorCode::PermanentResolverFailure,
                    });
                Ok((found,))
            })
        },
    )
}
