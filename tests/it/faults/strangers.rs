//! Who is not known: wrong identities, unknown nodes, and connections that end at the wrong port.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use peili_lab::node::Plan;
use peili_lab::{Image, wait};

use super::fleet::{Setup, trust};
use super::{NET, NEW, Slow, added, timed};
use crate::Case;

/// Longest wait for nodes to find out who is there.
const FOUND: Duration = Duration::from_secs(20);

pub(super) fn cases() -> Vec<Case> {
    vec![
        timed("faults::strangers::right_address_wrong_identity", &NET, wrong_identity),
        Case::new("faults::strangers::unknown_node_gets_and_gives_nothing", &NET, unknown_node),
        timed("faults::strangers::control_connection_at_the_peer_port", &NET, wrong_port),
        timed("faults::strangers::corrupt_identity_file", &NET, corrupt_identity),
    ]
}

fn image() -> Image {
    Image::builder("library/app", "v1").layers(3, 64 << 10).build().unwrap()
}

async fn wrong_identity() -> Result<(), Slow> {
    let (mut fleet, _) = Setup::new(1, image()).start().await;
    let control = fleet.control().await;
    // Another node of the same name comes up at the same address: it has an identity of its own.
    fleet.nodes[1].kill();
    std::fs::remove_file(fleet.nodes[1].plan.data_dir().join("identity.key")).unwrap();
    fleet.nodes[1].restart().await.unwrap();
    let problem = wait::until("the wrong identity is noticed", FOUND, async || {
        let peer = fleet.peer(&fleet.nodes[1].plan.peer_id).await?;
        let problem = peer["problem"].as_str()?.to_owned();
        (peer["connected"] == false && problem.contains("another identity")).then_some(problem)
    });
    println!("{}", problem.await.unwrap());
    let before = fleet.peer_bytes().await;
    let pull = fleet.pull().await;
    added("wrong identity", control, pull.elapsed, NEW)?;
    // The manifest may still come from the memory of the node that asks.
    assert_eq!(fleet.peer_bytes().await, before, "{pull:?}");
    assert!(pull.upstream >= fleet.image.layer_bytes(), "{pull:?}");
    Ok(())
}

/// The asker is unknown to the holder, though it knows the holder: it gets nothing from it. And the other way around.
async fn unknown_node() {
    for unknown_is_asker in [true, false] {
        let of = usize::from(unknown_is_asker);
        let forget = |plans: &mut Vec<Plan>| {
            // A list that has no other node: without any, the network would be open.
            let own = plans[of].peer_id.clone();
            plans[of].config["network"]["peers"] = serde_json::json!([{"id": own}]);
        };
        let (mut fleet, _) = Setup::new(1, image()).start_apart(forget).await;
        wait::until("a stranger refused", FOUND, async || {
            let refused = fleet.nodes[of].metric("peili_network_refused_connections_total", "").await.ok()?;
            (refused > 0.0).then_some(())
        })
        .await
        .unwrap();
        for node in &fleet.nodes {
            let status = node.status().await.unwrap();
            let connected =
                status["network"]["peers"].as_array().unwrap().iter().any(|p| p["connected"] == true);
            assert!(!connected, "{status}");
        }
        let pull = fleet.pull().await;
        assert_eq!(pull.mirrored, 0, "{pull:?}");
        assert!(fleet.nodes[1].metric("peili_mirror_served_total", "").await.unwrap() < 0.5);
    }
}

/// What a peer says on the control plane, replayed to the peer port; and a control plane that is told the peer port's
/// address. Nothing comes of either, and the ports go on serving.
async fn wrong_port() -> Result<(), Slow> {
    let (mut fleet, _) = Setup::new(1, image()).start().await;
    let control = fleet.control().await;
    let holder = fleet.network.nodes[1].address();
    let recorded = {
        // A node that takes this port for the holder's control plane says its first words here.
        let namespace = &fleet.network.nodes[2].namespace;
        let address = SocketAddr::new(fleet.network.nodes[2].address(), 5001);
        let listener = namespace.run(move || TcpListener::bind(address)).unwrap().unwrap();
        let between = namespace.clone();
        let mut plan = Plan::in_namespace(
            "misled",
            fleet.nodes[0].plan.config["store"]["source"].as_str().unwrap(),
            &fleet.network.nodes[2].namespace,
            address.ip(),
        )
        .unwrap();
        plan.merge(&serde_json::json!({"network": {"listen": ["127.0.0.1:5001"]}}));
        trust(&mut plan, &fleet.nodes[1].plan.peer_id, address);
        let misled = plan.start().await.unwrap();
        let record = move || {
            let (client, _) = listener.accept().unwrap();
            // The real control plane answers, so that the node says all that it has to say.
            let server = between.run(move || TcpStream::connect((holder, 5001))).unwrap().unwrap();
            for stream in [&client, &server] {
                stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            }
            let (mut answers, mut back) = (server.try_clone().unwrap(), client.try_clone().unwrap());
            let answering = std::thread::spawn(move || std::io::copy(&mut answers, &mut back));
            let (mut words, mut client, mut server) = (Vec::new(), client, server);
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = client.read(&mut buffer) {
                words.extend_from_slice(&buffer[..count]);
                if server.write_all(&buffer[..count]).is_err() {
                    break;
                }
            }
            let _ = answering.join();
            words
        };
        let words = tokio::task::spawn_blocking(record).await.unwrap();
        drop(misled);
        words
    };
    // What comes before the handshake is plain text, which no TLS takes: the ClientHello itself is what must be refused.
    let hello = recorded.windows(2).position(|bytes| bytes == [0x16, 0x03]).unwrap();
    let recorded = &recorded[hello..];
    assert!(recorded.len() > 500, "{} bytes", recorded.len());
    let replay = |port: u16| {
        let answer = fleet.network.nodes[0].namespace.run(move || {
            let mut stream = TcpStream::connect((holder, port)).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            stream.write_all(recorded).unwrap();
            let mut answer = Vec::new();
            // A reset is a refusal too.
            let _ = stream.read_to_end(&mut answer);
            answer
        });
        answer.unwrap()
    };
    let answer = replay(5002);
    // The ALPN names differ: a ServerHello and an alert (157 bytes) at most. A handshake that goes on has a certificate.
    assert!(answer.len() < 256, "the peer port answered {} bytes", answer.len());
    let pull = fleet.pull().await;
    assert_eq!(pull.upstream, 0, "{pull:?}");
    added("after the replay", control, pull.elapsed, NEW)
}

async fn corrupt_identity() -> Result<(), Slow> {
    for node in [1, 0] {
        let (mut fleet, _) = Setup::new(1, image()).start().await;
        let control = fleet.control().await;
        fleet.nodes[node].kill();
        std::fs::write(fleet.nodes[node].plan.data_dir().join("identity.key"), b"\x00garbage").unwrap();
        // Ready: it serves what it has.
        fleet.nodes[node].restart().await.unwrap();
        let problems = fleet.nodes[node].status().await.unwrap()["problems"].to_string();
        assert!(problems.contains("identity"), "{problems}");
        let own = if node == 0 { fleet.unrelated_layer() } else { fleet.layer(0) };
        assert_eq!(fleet.nodes[node].fetch(&own).await.unwrap().status, 200);
        let before = fleet.peer_bytes().await;
        let pull = fleet.pull().await;
        // The manifest may still come from the memory of the node that asks.
        assert_eq!(fleet.peer_bytes().await, before, "{pull:?}");
        assert!(pull.upstream >= fleet.image.layer_bytes(), "{pull:?}");
        added(&format!("a corrupt identity of node {node}"), control, pull.elapsed, NEW)?;
    }
    Ok(())
}
