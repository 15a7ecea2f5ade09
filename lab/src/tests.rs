//! The laboratory's own proof: its images are pulled through CRI by every generation of containerd, from its origin,
//! inside its namespaces; and its network really cuts, refuses and slows.

use std::io::{Read, Write};
use std::net::{IpAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::containerd::{Options, url};
use crate::image::Compression;
use crate::netns::{Addresses, Block};
use crate::origin::Challenge;
use crate::{Containerd, Generation, Image, Network, Origin, Requirement, skip_unless};

const LIMIT: Duration = Duration::from_secs(60);

#[tokio::test]
async fn containerd_1_6_pulls_from_the_origin() {
    pulls("containerd_1_6_pulls_from_the_origin", Generation::V1_6).await;
}

#[tokio::test]
async fn containerd_1_7_pulls_from_the_origin() {
    pulls("containerd_1_7_pulls_from_the_origin", Generation::V1_7).await;
}

#[tokio::test]
async fn containerd_2_pulls_from_the_origin() {
    pulls("containerd_2_pulls_from_the_origin", Generation::V2).await;
}

#[tokio::test]
async fn containerd_2_pulls_in_other_ways() {
    use Requirement::{Containerd as Has, Iproute2, Root};
    skip_unless!("containerd_2_pulls_in_other_ways", Root, Iproute2, Has(Generation::V2));
    let image = Image::builder("library/app", "v1").layer(12 << 20).build().unwrap();
    let ways = [(false, false, 0), (true, false, 4 << 20), (false, true, 0), (false, false, 4 << 20)];
    for (local_pull, discard_unpacked_layers, layer_fetch_buffer) in ways {
        let lab = Lab::new(Addresses::V4, |options| {
            options.generation = Generation::V2;
            options.local_pull = local_pull;
            options.discard_unpacked_layers = discard_unpacked_layers;
            options.layer_fetch_buffer = layer_fetch_buffer;
        })
        .await;
        lab.pull(&image).await;
        if discard_unpacked_layers {
            let gone = async || (!lab.containerd.has_blob(&image.layers[0])).then_some(());
            crate::wait::until("the layer discarded", LIMIT, gone).await.unwrap();
        } else {
            assert!(lab.containerd.has_blob(&image.layers[0]));
        }
        let ranges = lab.origin.requests().iter().filter(|request| request.range.is_some()).count();
        assert_eq!(ranges > 1, layer_fetch_buffer > 0, "{ranges}");
    }
}

#[tokio::test]
async fn a_password_is_asked_for_and_accepted() {
    use Requirement::{Containerd as Has, Iproute2, Root};
    skip_unless!("a_password_is_asked_for_and_accepted", Root, Iproute2, Has(Generation::V1_6));
    let image = Image::builder("team/secret", "v1").layer(4096).build().unwrap();
    for challenge in [Challenge::Basic, Challenge::Bearer] {
        let lab = Lab::new(Addresses::V4, |options| options.generation = Generation::V1_6).await;
        lab.origin.add(&image);
        lab.origin.set_password("team/secret", "user", "password", challenge);
        let reference = image.reference("lab.test");
        let error = lab.containerd.cri().pull(&reference, LIMIT).await.unwrap_err();
        assert!(!error.message.is_empty());
        lab.containerd.cri().pull_with(&reference, Some(("user", "password")), LIMIT).await.unwrap();
    }
}

#[tokio::test]
async fn a_killed_and_a_hung_containerd_come_back() {
    use Requirement::{Containerd as Has, Iproute2, Root};
    skip_unless!("a_killed_and_a_hung_containerd_come_back", Root, Iproute2, Has(Generation::V1_6));
    let mut lab = Lab::new(Addresses::V4, |options| options.generation = Generation::V1_6).await;
    lab.containerd.process().unwrap().pause().unwrap();
    let version = tokio::time::timeout(Duration::from_millis(300), lab.containerd.cri().version()).await;
    assert!(version.is_err());
    lab.containerd.process().unwrap().resume().unwrap();
    lab.containerd.cri().version().await.unwrap();
    lab.containerd.kill();
    assert!(lab.containerd.cri().version().await.is_err());
    lab.containerd.restart().await.unwrap();
}

#[test]
fn the_network_cuts_refuses_and_slows() {
    skip_unless!(
        "the_network_cuts_refuses_and_slows",
        Requirement::Root,
        Requirement::Iproute2,
        Requirement::Iptables
    );
    let network = Network::new(2, Addresses::Dual).unwrap();
    let server = &network.nodes[1];
    let listen: Vec<_> = server.addresses().map(|address| (address, 80).into()).collect();
    let origin = Origin::start_at(Some(&server.namespace), &listen).unwrap();
    let image = Image::builder("a", "v1").layer(2 << 20).build().unwrap();
    origin.add(&image);
    let connect = |address: IpAddr| {
        let limit = Duration::from_millis(300);
        let connect =
            || TcpStream::connect_timeout(&(address, 80).into(), limit).map_err(|error| error.kind());
        network.nodes[0].namespace.run(connect).unwrap()
    };
    for address in server.addresses() {
        let check = |block, kind| {
            connect(address).unwrap();
            network.block(0, 1, block).unwrap();
            assert_eq!(connect(address).unwrap_err(), kind, "{address} {block:?}");
            network.unblock(0, 1, block).unwrap();
            connect(address).unwrap();
        };
        check(Block::Drop, std::io::ErrorKind::TimedOut);
        check(Block::Reject, std::io::ErrorKind::ConnectionRefused);
    }
    let v4 = server.address();
    network.set_link(1, false).unwrap();
    connect(v4).unwrap_err();
    network.set_link(1, true).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while connect(v4).is_err() {
        assert!(Instant::now() < deadline, "the link does not come back");
    }

    // 2 MiB, less the burst, at 16 Mbit/s takes 0.9 s; unlimited it takes milliseconds.
    let download = || {
        let mut stream = connect(v4).unwrap();
        let started = Instant::now();
        write!(stream, "GET /v2/a/blobs/{} HTTP/1.0\r\n\r\n", image.layers[0]).unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        assert!(bytes.len() > 2 << 20);
        started.elapsed()
    };
    assert!(download() < Duration::from_millis(700));
    network.set_rate(1, Some(16_000_000)).unwrap();
    assert!(download() > Duration::from_millis(700));
    network.set_rate(1, None).unwrap();
}

#[test]
fn a_network_leaves_nothing_behind() {
    skip_unless!("a_network_leaves_nothing_behind", Requirement::Root, Requirement::Iproute2);
    let network = Network::new(2, Addresses::V4).unwrap();
    let names: Vec<_> = network.nodes.iter().map(|node| node.namespace.name().to_owned()).collect();
    let exists = |name: &String| std::path::Path::new("/run/netns").join(name).exists();
    assert!(names.iter().all(exists));
    drop(network);
    assert!(!names.iter().any(exists));
}

/// A node with a containerd, and another with the origin.
struct Lab {
    containerd: Containerd,
    origin: Origin,
    _network: Network,
}

impl Lab {
    async fn new(addresses: Addresses, set: impl FnOnce(&mut Options)) -> Self {
        let network = Network::new(2, addresses).unwrap();
        let server = &network.nodes[1];
        let origin = Origin::start_at(Some(&server.namespace), &[(server.address(), 80).into()]).unwrap();
        let mut options = Options::new(Generation::V1_6).in_namespace(&network.nodes[0].namespace);
        set(&mut options);
        let containerd = Containerd::start(options).await.unwrap();
        containerd.set_hosts("lab.test", &url(server.address(), 80), &[]).unwrap();
        Self { containerd, origin, _network: network }
    }

    async fn pull(&self, image: &Image) {
        self.origin.add(image);
        let reference = image.reference("lab.test");
        self.containerd.cri().pull(&reference, LIMIT).await.unwrap();
        let images = self.containerd.cri().images_listed().await.unwrap();
        assert!(images.contains(&reference), "{images:?}");
    }
}

async fn pulls(name: &str, generation: Generation) {
    use Requirement::{Containerd as Has, Gzip, Iproute2, Root, Zstd};
    skip_unless!(name, Root, Iproute2, Gzip, Zstd, Has(generation));
    let platforms = [("linux", crate::image::architecture()), ("linux", "s390x")];
    let images = [
        Image::builder("library/index", "v1").layer(1 << 20).platforms(&platforms),
        Image::builder("library/many", "v1").layers(40, 4096).seed(2),
        Image::builder("library/large", "v1").layer(64 << 20).seed(3),
        Image::builder("library/gzip", "v1").compressed(1 << 20, Compression::Gzip).seed(4),
        Image::builder("library/zstd", "v1").compressed(1 << 20, Compression::Zstd).seed(5),
        Image::builder("library/docker", "v1").layer(1 << 20).docker().seed(6),
    ];
    let lab = Lab::new(Addresses::V6, |options| options.generation = generation).await;
    for builder in images {
        let image = builder.build().unwrap();
        lab.origin.reset();
        lab.pull(&image).await;
        let fetched = image.layers.iter().filter(|digest| lab.containerd.has_blob(digest));
        let bytes: u64 = fetched.map(|digest| image.blobs[digest].size).sum();
        assert_eq!(lab.origin.layer_bytes(&image), bytes, "{}", image.repository);
        assert!(bytes > 0);
        lab.containerd.cri().remove(&image.reference("lab.test")).await.unwrap();
    }
}
