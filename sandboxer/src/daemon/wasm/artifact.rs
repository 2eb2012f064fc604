//! Images whose layer is the module itself (OCI artifacts). containerd pulls them, but has nothing
//! to unpack: the container's root is empty. The module is read from its content store, by the same
//! API that `ctr content get` uses.

use std::path::{Path, PathBuf};

use bulkhead_protocol::rpc::{Code, Status};
use bytes::{Buf, Bytes, BytesMut};
use h2::client::SendRequest;
use http::Request;
use prost::Message;
use serde_json::Value;
use tokio::net::UnixStream;

use crate::daemon::sandbox::Answer;
use crate::image::is_module;
use crate::timeouts;

/// Largest manifest or index that is read.
const MAX_MANIFEST: u64 = 4 << 20;
/// Largest message of containerd's; it sends files in pieces of far less.
const MAX_MESSAGE: usize = 16 << 20;
/// What a layer is called in its manifest, by the OCI's convention.
const TITLE: &str = "org.opencontainers.image.title";

/// `containerd.services.containers.v1.GetContainerRequest` and `…images.v1.GetImageRequest`.
#[derive(Clone, PartialEq, prost::Message)]
struct Name {
    #[prost(string, tag = "1")]
    name: String,
}

/// `containerd.services.containers.v1.GetContainerResponse`, as far as used.
#[derive(Clone, PartialEq, prost::Message)]
struct ContainerAnswer {
    #[prost(message, optional, tag = "1")]
    container: Option<ContainerRecord>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ContainerRecord {
    #[prost(string, tag = "3")]
    image: String,
}

/// `containerd.services.images.v1.GetImageResponse`, as far as used.
#[derive(Clone, PartialEq, prost::Message)]
struct ImageAnswer {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageRecord>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ImageRecord {
    #[prost(message, optional, tag = "3")]
    target: Option<Descriptor>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Descriptor {
    #[prost(string, tag = "2")]
    digest: String,
    #[prost(int64, tag = "3")]
    size: i64,
}

/// `containerd.services.content.v1.ReadContentRequest`; all of it.
#[derive(Clone, PartialEq, prost::Message)]
struct ReadRequest {
    #[prost(string, tag = "1")]
    digest: String,
}

/// `containerd.services.content.v1.ReadContentResponse`.
#[derive(Clone, PartialEq, prost::Message)]
struct ReadAnswer {
    #[prost(bytes = "bytes", tag = "2")]
    data: Bytes,
}

/// A module in containerd's content store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Digest, as `sha256:…`.
    pub digest: String,
    /// Bytes.
    pub size: u64,
}

/// containerd's API.
#[derive(Debug)]
pub struct Containerd {
    sender: SendRequest<Bytes>,
    socket: PathBuf,
    namespace: String,
}

fn failed(what: impl std::fmt::Display) -> Status {
    Status::new(Code::Unavailable, what.to_string())
}

impl Containerd {
    /// Connects. containerd's socket of events is known; that of its API has the same name without
    /// `.ttrpc`.
    ///
    /// # Errors
    /// Nobody listens there.
    pub async fn connect(events: &Path, namespace: &str) -> Answer<Self> {
        let socket = match events.extension() {
            Some(end) if end == "ttrpc" => events.with_extension(""),
            _ => events.to_owned(),
        };
        let shown = socket.display().to_string();
        let connect = async {
            let stream = UnixStream::connect(&socket).await.map_err(failed)?;
            h2::client::Builder::new()
                .initial_window_size(1 << 20)
                .initial_connection_window_size(2 << 20)
                .handshake(stream)
                .await
                .map_err(failed)
        };
        let (sender, connection) = tokio::time::timeout(timeouts::connect(), connect)
            .await
            .unwrap_or_else(|_| Err(failed("no answer")))
            .map_err(|e| failed(format!("containerd at {shown}: {}", e.message)))?;
        tokio::spawn(connection);
        Ok(Self {
            sender,
            socket,
            namespace: namespace.to_owned(),
        })
    }

    /// The module that a container's image is, if it is one. `wanted`: the name of the file, for
    /// images of several.
    ///
    /// # Errors
    /// containerd does not tell, or the image has several and none of this name.
    pub async fn module_of(&self, container: &str, wanted: &str) -> Answer<Option<Module>> {
        let name = |name: &str| Name {
            name: name.to_owned(),
        };
        let containers = "containerd.services.containers.v1.Containers/Get";
        let record: ContainerAnswer = self.get(containers, &name(container)).await?;
        let image = record.container.unwrap_or_default().image;
        let images = "containerd.services.images.v1.Images/Get";
        let record: ImageAnswer = self.get(images, &name(&image)).await?;
        let target = record.image.and_then(|i| i.target).unwrap_or_default();
        let mut manifest = self.json(&target.digest).await?;
        if let Some(digest) = of_this_host(&manifest) {
            manifest = self.json(&digest).await?;
        }
        module_in(&manifest, &image, wanted)
    }

    /// Reads something from the content store.
    ///
    /// # Errors
    /// It is not there, is larger than `limit`, or breaks off.
    pub async fn read(&self, digest: &str, limit: u64) -> Answer<Bytes> {
        let request = ReadRequest {
            digest: digest.to_owned(),
        };
        let mut all = BytesMut::new();
        let add = |message: Bytes| {
            let answer = ReadAnswer::decode(message).map_err(failed)?;
            all.extend_from_slice(&answer.data);
            match u64::try_from(all.len()).is_ok_and(|n| n <= limit) {
                true => Ok(()),
                false => Err(Status::new(
                    Code::ResourceExhausted,
                    format!("{digest} has more than {limit} bytes"),
                )),
            }
        };
        self.call("containerd.services.content.v1.Content/Read", &request, add)
            .await?;
        Ok(all.freeze())
    }

    async fn json(&self, digest: &str) -> Answer<Value> {
        let bytes = self.read(digest, MAX_MANIFEST).await?;
        serde_json::from_slice(&bytes)
            .map_err(|e| Status::new(Code::InvalidArgument, format!("manifest {digest}: {e}")))
    }

    /// A call with one answer.
    async fn get<A: Message + Default>(&self, path: &str, request: &Name) -> Answer<A> {
        let mut answer = A::default();
        self.call(path, request, |message| {
            answer = A::decode(message).map_err(failed)?;
            Ok(())
        })
        .await?;
        Ok(answer)
    }

    async fn call(
        &self,
        path: &str,
        request: &impl Message,
        each: impl FnMut(Bytes) -> Answer<()>,
    ) -> Answer<()> {
        let call = self.exchange(path, request.encode_to_vec(), each);
        let result = tokio::time::timeout(timeouts::call(), call).await;
        let result = result.unwrap_or_else(|_| Err(failed("no answer in time")));
        result.map_err(|status| {
            let socket = self.socket.display();
            let code = Code::try_from(status.code).unwrap_or(Code::Unknown);
            Status::new(code, format!("containerd at {socket}: {}", status.message))
        })
    }

    async fn exchange(
        &self,
        path: &str,
        payload: Vec<u8>,
        mut each: impl FnMut(Bytes) -> Answer<()>,
    ) -> Answer<()> {
        let request = Request::builder()
            .method("POST")
            .uri(format!("http://localhost/{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("containerd-namespace", &self.namespace)
            .body(())
            .map_err(failed)?;
        let mut sender = self.sender.clone().ready().await.map_err(failed)?;
        let (answer, mut body) = sender.send_request(request, false).map_err(failed)?;
        let mut frame = BytesMut::with_capacity(payload.len() + 5);
        frame.extend_from_slice(&[0]);
        let length = u32::try_from(payload.len()).map_err(failed)?;
        frame.extend_from_slice(&length.to_be_bytes());
        frame.extend_from_slice(&payload);
        body.send_data(frame.freeze(), true).map_err(failed)?;
        let (head, mut body) = answer.await.map_err(failed)?.into_parts();
        let mut data = BytesMut::new();
        while let Some(chunk) = body.data().await {
            let chunk = chunk.map_err(failed)?;
            let _ = body.flow_control().release_capacity(chunk.len());
            data.extend_from_slice(&chunk);
            while let Some(message) = next_message(&mut data)? {
                each(message)?;
            }
        }
        // An error without a body comes in the head.
        let trailers = body.trailers().await.map_err(failed)?;
        let trailers = trailers.unwrap_or(head.headers);
        let field = |name: &str| trailers.get(name).and_then(|v| v.to_str().ok());
        let code = field("grpc-status").and_then(|v| v.parse().ok());
        match code {
            Some(0) => Ok(()),
            _ => {
                let code = code.and_then(|c: i32| Code::try_from(c).ok());
                let text = field("grpc-message").unwrap_or("the call failed");
                Err(Status::new(code.unwrap_or(Code::Unknown), text))
            }
        }
    }
}

/// Takes one whole gRPC message off the front.
fn next_message(data: &mut BytesMut) -> Answer<Option<Bytes>> {
    let Some([compressed, length @ ..]) = data.first_chunk::<5>().copied() else {
        return Ok(None);
    };
    let length = u32::from_be_bytes(length) as usize;
    if compressed != 0 || length > MAX_MESSAGE {
        return Err(failed("an answer that is compressed or too large"));
    }
    if data.len() < length + 5 {
        return Ok(None);
    }
    data.advance(5);
    Ok(Some(data.split_to(length).freeze()))
}

/// Of an index, the manifest that containerd has taken; `None`: it is a manifest.
fn of_this_host(index: &Value) -> Option<String> {
    let fits = |platform: &Value| {
        platform.is_null() || platform["os"] == "linux" && platform["architecture"] == "amd64"
    };
    let all = index["manifests"].as_array()?;
    let one = all.iter().find(|m| fits(&m["platform"]))?;
    one["digest"].as_str().map(str::to_owned)
}

fn module_in(manifest: &Value, image: &str, wanted: &str) -> Answer<Option<Module>> {
    let layers = manifest["layers"].as_array().map(Vec::as_slice);
    let modules: Vec<&Value> = layers
        .unwrap_or_default()
        .iter()
        .filter(|l| l["mediaType"].as_str().is_some_and(is_module))
        .collect();
    let title = |layer: &Value| layer["annotations"][TITLE].as_str().map(str::to_owned);
    let chosen = match modules.as_slice() {
        [] => return Ok(None),
        [only] => only,
        several => several
            .iter()
            .find(|l| title(l).as_deref() == Some(wanted))
            .ok_or_else(|| {
                let names: Vec<String> = several.iter().filter_map(|l| title(l)).collect();
                let text = format!(
                    "image {image} has {} modules, none of them called {wanted:?}: name one of [{}]",
                    several.len(),
                    names.join(", ")
                );
                Status::new(Code::InvalidArgument, text)
            })?,
    };
    let digest = chosen["digest"].as_str().unwrap_or_default().to_owned();
    let size = chosen["size"].as_u64().unwrap_or_default();
    Ok(Some(Module { digest, size }))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn layer(kind: &str, digest: &str, title: Option<&str>) -> Value {
        let annotations = title.map(|t| json!({TITLE: t}));
        json!({"mediaType": kind, "digest": digest, "size": 7, "annotations": annotations})
    }

    #[test]
    fn a_layer_that_is_a_module_is_found() {
        let tar = layer("application/vnd.oci.image.layer.v1.tar", "sha256:0", None);
        let one = layer("application/wasm", "sha256:1", None);
        let found = |layers: &[Value], wanted| {
            let manifest = json!({"layers": layers});
            module_in(&manifest, "i", wanted).map(|m| m.map(|m| m.digest))
        };
        assert_eq!(found(std::slice::from_ref(&tar), "x"), Ok(None));
        assert_eq!(found(&[tar, one.clone()], "x"), Ok(Some("sha256:1".into())));
        let two = layer("application/wasm", "sha256:2", Some("two.wasm"));
        let both = [one, two];
        assert_eq!(found(&both, "two.wasm"), Ok(Some("sha256:2".into())));
        let refused = found(&both, "x.wasm").expect_err("not clear");
        assert!(refused.message.contains("two.wasm"), "{}", refused.message);
        assert_eq!(module_in(&json!(7), "i", ""), Ok(None));
    }

    #[test]
    fn an_index_leads_to_the_hosts_manifest() {
        let entry = |digest: &str, os: &str, architecture: &str| json!({"digest": digest, "platform": {"os": os, "architecture": architecture}});
        let all = [entry("a", "linux", "arm64"), entry("b", "linux", "amd64")];
        assert_eq!(
            of_this_host(&json!({"manifests": all})).as_deref(),
            Some("b")
        );
        assert_eq!(of_this_host(&json!({"layers": []})), None);
        assert_eq!(of_this_host(&json!({"manifests": "x"})), None);
    }

    #[test]
    fn messages_come_in_pieces() {
        let mut data = BytesMut::from(&[0, 0, 0, 0, 2, 7][..]);
        assert_eq!(next_message(&mut data), Ok(None));
        data.extend_from_slice(&[8, 0, 0]);
        let message = next_message(&mut data).expect("good").expect("whole");
        assert_eq!((&message[..], &data[..]), (&[7, 8][..], &[0, 0][..]));
        let mut bad = BytesMut::from(&[0, 255, 0, 0, 0][..]);
        assert!(next_message(&mut bad).is_err());
        let mut bad = BytesMut::from(&[1, 0, 0, 0, 0][..]);
        assert!(next_message(&mut bad).is_err());
    }
}
