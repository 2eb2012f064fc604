//! Outgoing HTTP requests of components, by sockets of the pod.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::http::uri::Scheme;
use hyper::{Request, Response, Uri};
use tokio::net::TcpStream;
use wasmtime_wasi_http::io::TokioIo;
use wasmtime_wasi_http::{Error, RequestOptions, WasiBody, WasiHttpHooks};

use crate::names::{NameError, Resolver};

/// Unless the program says otherwise.
const TIMEOUT: Duration = Duration::from_secs(600);

type Work = Box<dyn Future<Output = Result<(), Error>> + Send>;
type Answer = Result<(Response<WasiBody>, Work), Error>;

/// Sends requests for one instance; the calling thread's network namespace is the pod's.
#[derive(Debug)]
pub(crate) struct Client {
    resolver: Arc<Resolver>,
    allowed: bool,
}

impl Client {
    pub(crate) fn new(resolver: Arc<Resolver>, allowed: bool) -> Self {
        Self { resolver, allowed }
    }

    pub(crate) fn resolver(&self) -> &Arc<Resolver> {
        &self.resolver
    }
}

fn name_error(error: &NameError) -> Error {
    Error::DnsError {
        rcode: Some(error.to_string()),
        info_code: None,
    }
}

async fn connect(resolver: &Resolver, host: &str, port: u16) -> Result<TcpStream, Error> {
    let addresses = resolver.resolve(host).await.map_err(|e| name_error(&e))?;
    let mut last = Error::DestinationNotFound;
    for address in addresses {
        match TcpStream::connect(SocketAddr::new(address, port)).await {
            Ok(stream) => {
                // Requests are written whole; waiting for more would only delay them.
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Err(e) => last = Error::Connect(e),
        }
    }
    Err(last)
}

async fn send(
    resolver: Arc<Resolver>,
    mut request: Request<WasiBody>,
    options: Option<RequestOptions>,
) -> Answer {
    let uri = request.uri();
    let host = uri.host().ok_or(Error::HttpRequestUriInvalid)?.to_owned();
    if uri.scheme() == Some(&Scheme::HTTPS) {
        return Err(Error::InternalError(Some(
            "https is not supported by this sandbox: use http, or a proxy in the pod".into(),
        )));
    }
    let port = uri.port_u16().unwrap_or(80);
    let path = uri.path_and_query().map_or("/", |p| p.as_str()).to_owned();
    let of = |pick: fn(&RequestOptions) -> Option<Duration>| {
        options.as_ref().and_then(pick).unwrap_or(TIMEOUT)
    };
    let connecting = of(|o| o.connect_timeout);
    let first_byte = of(|o| o.first_byte_timeout);
    let stream = tokio::time::timeout(connecting, connect(&resolver, &host, port))
        .await
        .map_err(|_| Error::ConnectionTimeout)??;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(Error::from)?;
    // On the wire a request to an origin has the path only (RFC 9112, 3.2.1).
    *request.uri_mut() = Uri::builder()
        .path_and_query(path)
        .build()
        .map_err(|_| Error::HttpRequestUriInvalid)?;
    // The connection must move while the answer is waited for, and after it for the body.
    let connection = tokio::spawn(connection);
    let abort = AbortOnDrop(connection.abort_handle());
    let response = tokio::time::timeout(first_byte, sender.send_request(request))
        .await
        .map_err(|_| Error::ConnectionReadTimeout)?
        .map_err(Error::from)?;
    let work = async move {
        let _abort = abort;
        match connection.await {
            Ok(result) => result.map_err(Error::from),
            Err(_) => Err(Error::ConnectionTerminated),
        }
    };
    Ok((
        response.map(|body| body.map_err(Error::from).boxed_unsync()),
        Box::new(work),
    ))
}

/// A program that ends takes its connections with it.
struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl WasiHttpHooks for Client {
    fn send_request(
        &mut self,
        request: Request<WasiBody>,
        options: Option<RequestOptions>,
        _response_error: Work,
    ) -> Box<dyn Future<Output = Answer> + Send> {
        if !self.allowed {
            return Box::new(async { Err(Error::HttpRequestDenied) });
        }
        Box::new(send(Arc::clone(&self.resolver), request, options))
    }
}
