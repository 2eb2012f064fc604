//! Serves a program that answers HTTP requests: each request has an instance of its own, made from
//! a prepared one, gone afterwards.

use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{HOST, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, Version};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinSet;
use wasmtime::AsContextMut;
use wasmtime_wasi_http::handler::{Prepared, Proxy};
use wasmtime_wasi_http::io::TokioIo;
use wasmtime_wasi_http::p2::bindings::http::types::{ErrorCode, Scheme};
use wasmtime_wasi_http::p2::body::HyperOutgoingBody;
use wasmtime_wasi_http::{Error, WasiBody, WasiHttpView};

use crate::error::one_line;
use crate::exit::Exit;
use crate::program::Code;
use crate::run::Setup;
use crate::state::ComponentState;

/// Queue of connections the kernel keeps for us.
const BACKLOG: i32 = 1024;
/// Connections open on one thread; more wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 1024;

/// Serves until it is ended, or asked to finish.
pub(crate) async fn serve(setup: &Arc<Setup>) -> Exit {
    let config = &setup.config.http;
    let listener = match listen(config.listen) {
        Ok(listener) => listener,
        Err(e) => return Exit::failed(format!("listening on {}: {e}", config.listen)),
    };
    setup.inner.control.serve();
    let requests = Arc::new(Semaphore::new(config.concurrent.max(1)));
    let mut others = Vec::new();
    for _ in 1..config.threads.max(1) {
        let Ok(listener) = listener.try_clone() else {
            break;
        };
        let (done, wait) = oneshot::channel::<()>();
        let (setup_there, requests) = (Arc::clone(setup), Arc::clone(&requests));
        let job = Box::new(move |runtime: &Runtime| {
            let _cpu = setup_there.inner.control.cpu.attach();
            runtime.block_on(accept(&setup_there, listener, requests));
            drop(done);
        });
        let started = setup.inner.pod.threads.run(setup.config.user.as_ref(), job);
        // Fewer threads serve as well.
        if started.is_err() {
            break;
        }
        others.push(wait);
    }
    accept(setup, listener, requests).await;
    for other in others {
        let _ = other.await;
    }
    match setup.inner.control.signal() {
        Some(signal) => Exit::signal(signal),
        None => Exit::code(0),
    }
}

fn listen(address: std::net::SocketAddr) -> std::io::Result<StdListener> {
    use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage};
    let family = if address.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket::socket(family, SockType::Stream, flags, None)?;
    socket::setsockopt(&fd, socket::sockopt::ReuseAddr, &true)?;
    socket::bind(
        std::os::fd::AsRawFd::as_raw_fd(&fd),
        &SockaddrStorage::from(address),
    )?;
    socket::listen(&fd, Backlog::new(BACKLOG)?)?;
    Ok(StdListener::from(fd))
}

/// Takes connections on one thread.
async fn accept(setup: &Arc<Setup>, listener: StdListener, requests: Arc<Semaphore>) {
    let Ok(listener) = TcpListener::from_std(listener) else {
        return;
    };
    let control = Arc::clone(&setup.inner.control);
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let room = connections.len() < MAX_CONNECTIONS;
        tokio::select! {
            biased;
            () = control.draining() => break,
            accepted = listener.accept(), if room => {
                let Ok((stream, _)) = accepted else {
                    // No descriptors left, most likely: the ones in use come back.
                    tokio::time::sleep(std::time::Duration::from_millis(10)).await;
                    continue;
                };
                let _ = stream.set_nodelay(true);
                let (setup, requests) = (Arc::clone(setup), Arc::clone(&requests));
                connections.spawn(connection(setup, stream, requests));
            }
            _ = connections.join_next(), if !room => {}
        }
    }
    drop(listener);
    tokio::select! {
        biased;
        _ = control.killed() => {}
        () = async { while connections.join_next().await.is_some() {} } => {}
    }
}

async fn connection(setup: Arc<Setup>, stream: tokio::net::TcpStream, requests: Arc<Semaphore>) {
    let control = Arc::clone(&setup.inner.control);
    let own = stream.local_addr().ok();
    let service = service_fn(|request| {
        let (setup, requests) = (Arc::clone(&setup), Arc::clone(&requests));
        async move {
            Ok::<_, Infallible>(match with_host(request, own) {
                Some(request) => answer(setup, request, requests).await,
                None => error(StatusCode::BAD_REQUEST, "the request names no host\n"),
            })
        }
    });
    let connection = http1::Builder::new()
        .keep_alive(true)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    tokio::select! {
        // What clients send wrongly is theirs to see.
        _ = connection.as_mut() => return,
        () = control.draining() => connection.as_mut().graceful_shutdown(),
    }
    let _ = connection.await;
}

/// Programs are told whom a request is for. Before HTTP 1.1 clients need not say so: then it is the
/// address that they have connected to. `None`: this one had to.
fn with_host<B>(mut request: Request<B>, own: Option<SocketAddr>) -> Option<Request<B>> {
    if request.uri().authority().is_some() || request.headers().contains_key(HOST) {
        return Some(request);
    }
    if request.version() > Version::HTTP_10 {
        return None;
    }
    let own = own.map_or_else(|| "localhost".to_owned(), |own| own.to_string());
    let host = HeaderValue::from_str(&own).ok()?;
    request.headers_mut().insert(HOST, host);
    Some(request)
}

fn error(status: StatusCode, text: &str) -> Response<WasiBody> {
    let body = Full::new(Bytes::copy_from_slice(text.as_bytes()))
        .map_err(|never| match never {})
        .boxed_unsync();
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
}

/// Answers one request. A program that fails is told to the client as little as possible and to
/// the program's own log as much as is known.
async fn answer(
    setup: Arc<Setup>,
    request: Request<Incoming>,
    requests: Arc<Semaphore>,
) -> Response<WasiBody> {
    let Ok(permit) = requests.acquire_owned().await else {
        return error(StatusCode::SERVICE_UNAVAILABLE, "shutting down\n");
    };
    let (sender, receiver) = oneshot::channel();
    let timeout = setup.config.http.timeout;
    // The instance lives on after its response's head: the body, and what comes after it.
    let work = tokio::spawn(async move {
        let result = setup
            .guarded(Some(timeout), handle(&setup, request, sender))
            .await;
        drop(permit);
        match result {
            Ok(Ok(())) => None,
            Ok(Err(e)) => Some(setup.request_failed(&e)),
            Err(exit) => Some(exit),
        }
    });
    match receiver.await {
        Ok(Ok(response)) => response,
        Ok(Err(e)) => error(
            StatusCode::BAD_GATEWAY,
            &format!("the program gave up: {e}\n"),
        ),
        Err(_) => {
            let exit = work.await.ok().flatten();
            match exit.map(|e| e.reason) {
                Some(crate::Reason::OutOfMemory) => {
                    error(StatusCode::INSUFFICIENT_STORAGE, "out of memory\n")
                }
                Some(crate::Reason::Deadline) => {
                    error(StatusCode::GATEWAY_TIMEOUT, "the program took too long\n")
                }
                Some(crate::Reason::Failed) => error(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "no instance could be made\n",
                ),
                _ => error(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "the program failed; see its log\n",
                ),
            }
        }
    }
}

/// Without a response: the program gave up, and says how.
type Reply = oneshot::Sender<Result<Response<HyperOutgoingBody>, String>>;

async fn handle(setup: &Setup, request: Request<Incoming>, reply: Reply) -> Result<(), Failed> {
    match &setup.config.program.0.code {
        Code::Http(pre) => p2(setup, pre, request, reply).await,
        Code::HttpP3(pre) => p3(setup, pre, request, reply).await,
        _ => Err(Failed {
            error: wasmtime::Error::msg("not an HTTP program"),
            instantiated: false,
        }),
    }
}

/// A failed request.
pub(crate) struct Failed {
    pub(crate) error: wasmtime::Error,
    pub(crate) instantiated: bool,
}

async fn p2(
    setup: &Setup,
    pre: &wasmtime_wasi_http::p2::bindings::ProxyPre<ComponentState>,
    request: Request<Incoming>,
    reply: Reply,
) -> Result<(), Failed> {
    let before = |error| Failed {
        error,
        instantiated: false,
    };
    let after = |error| Failed {
        error,
        instantiated: true,
    };
    let mut store = setup.component_store().map_err(before)?;
    let mut http = store.data_mut().http();
    let request = http
        .new_incoming_request(Scheme::Http, request)
        .map_err(before)?;
    let out = http
        .new_response_outparam_from_callback(move |response: Result<_, ErrorCode>| {
            // The client may have gone.
            let _ = reply.send(response.map_err(|e| one_line(&format!("{e:?}"))));
        })
        .map_err(before)?;
    let proxy = pre.instantiate_async(&mut store).await.map_err(before)?;
    proxy
        .wasi_http_incoming_handler()
        .call_handle(&mut store, request, out)
        .await
        .map_err(after)
}

async fn p3(
    setup: &Setup,
    pre: &wasmtime_wasi_http::p3::bindings::ServicePre<ComponentState>,
    request: Request<Incoming>,
    reply: Reply,
) -> Result<(), Failed> {
    let before = |error| Failed {
        error,
        instantiated: false,
    };
    let after = |error| Failed {
        error,
        instantiated: true,
    };
    let mut store = setup.component_store().map_err(before)?;
    let proxy = Proxy::P3(pre.instantiate_async(&mut store).await.map_err(before)?);
    let request = request.map(|body| body.map_err(Error::from).boxed_unsync());
    let (sender, receiver) = futures_channel::oneshot::channel();
    let prepared = Prepared::new(
        store.as_context_mut(),
        &proxy,
        request,
        ComponentState::http,
        sender,
    )
    .map_err(before)?;
    // The head of the response goes out while the program still works on the body.
    let head = async move {
        match receiver.await {
            Ok(Ok(response)) => {
                let _ = reply.send(Ok(response));
                Ok(())
            }
            Ok(Err(e)) => Err(e),
            Err(_) => Err(wasmtime::Error::msg("no response")),
        }
    };
    let work = store.run_concurrent(async |accessor| {
        prepared.run(accessor, std::future::pending()).await?;
        std::future::poll_fn(|cx| accessor.poll_no_interesting_tasks(cx)).await;
        wasmtime::error::Ok(())
    });
    let (head, work) = tokio::join!(head, work);
    head.and(work.flatten()).map_err(after)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_clients_need_name_no_host() {
        let own: SocketAddr = "10.0.0.1:8080".parse().expect("address");
        let request = |version, host: Option<&str>| {
            let mut request = Request::builder().version(version).uri("/x");
            if let Some(host) = host {
                request = request.header(HOST, host);
            }
            with_host(request.body(()).expect("request"), Some(own))
        };
        let told =
            |request: Option<Request<()>>| Some(request?.headers()[HOST].to_str().ok()?.to_owned());
        assert_eq!(
            told(request(Version::HTTP_10, None)).as_deref(),
            Some("10.0.0.1:8080")
        );
        assert_eq!(
            told(request(Version::HTTP_10, Some("a"))).as_deref(),
            Some("a")
        );
        assert_eq!(
            told(request(Version::HTTP_11, Some("b"))).as_deref(),
            Some("b")
        );
        assert!(request(Version::HTTP_11, None).is_none());
    }
}
