//! The cases.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use peili::oci::Digest;
use peili_lab::node::Node;
use peili_lab::wait;

use super::bed::{Bed, SMALL, Store, blob_path, manifest_path};
use super::load::{self, Client};
use super::{PATIENCE, Report};

const GIB: f64 = (1_u64 << 30) as f64;
/// Before idle memory is read: a start's garbage is gone, intervals have run.
pub(crate) const SETTLE: Duration = Duration::from_secs(10);
/// Nodes that pull at once in the memory case.
const PULLERS: usize = 4;

/// Bytes through a node that has not got them, to a client that drops them; and the same bytes from nginx.
pub(crate) async fn throughput(bed: &Bed, repeats: u32) -> Result<Report> {
    let mut report = Report::new("throughput");
    let layer = bed.layer()?;
    let path = format!("/v2/{}/blobs/{layer}", bed.image.repository);
    let mut nginx = [Vec::new(), Vec::new()];
    for round in 0..=repeats {
        let before = bed.nginx_usage()?.cpu;
        let (path, namespace) = (path.clone(), bed.namespace(1));
        let (bytes, elapsed) = load::with(namespace, bed.nginx(), move |client| whole(client, &path)).await?;
        let cpu = bed.nginx_usage()?.cpu - before;
        if round > 0 {
            nginx[0].push(bytes / elapsed / 1e9);
            nginx[1].push(cpu.as_secs_f64() / (bytes / GIB));
        }
    }
    let [speed, cpu] = nginx;
    report.add("nginx GB/s", speed);
    report.add("nginx CPU s/GiB", cpu);
    let path = blob_path(&bed.image.repository, &layer);
    plain(bed, repeats, &path, &mut report).await?;
    for verify in [false, true] {
        let nodes = bed.nodes(2, Store::Holder, verify).await?;
        let mut figures = [const { Vec::new() }; 4];
        for round in 0..=repeats {
            let before = [cpu_of(&nodes[0])?, cpu_of(&nodes[1])?];
            let path = path.clone();
            let (bytes, elapsed) =
                load::with(bed.namespace(1), nodes[1].registry(), move |client| whole(client, &path)).await?;
            let [holder, puller] = [cpu_of(&nodes[0])? - before[0], cpu_of(&nodes[1])? - before[1]]
                .map(|cpu| cpu / (bytes / GIB));
            if round > 0 {
                for (figure, value) in
                    figures.iter_mut().zip([bytes / elapsed / 1e9, holder, puller, holder + puller])
                {
                    figure.push(value);
                }
            }
        }
        let how = if verify { "verified" } else { "unverified" };
        let names = ["GB/s", "holder CPU s/GiB", "puller CPU s/GiB", "both CPU s/GiB"];
        for (name, values) in names.into_iter().zip(figures) {
            report.add(format!("{how} {name}"), values);
        }
    }
    Ok(report)
}

/// The same bytes from the holder's own registry, without TLS and without a second node: what TLS is compared with.
async fn plain(bed: &Bed, repeats: u32, path: &str, report: &mut Report) -> Result<()> {
    let nodes = bed.nodes(1, Store::Holder, true).await?;
    let mut figures = [Vec::new(), Vec::new()];
    for round in 0..=repeats {
        let (before, path) = (cpu_of(&nodes[0])?, path.to_owned());
        let get = load::with(bed.namespace(0), nodes[0].registry(), move |client| whole(client, &path));
        let (bytes, elapsed) = get.await?;
        if round > 0 {
            figures[0].push(bytes / elapsed / 1e9);
            figures[1].push((cpu_of(&nodes[0])? - before) / (bytes / GIB));
        }
    }
    let [speed, cpu] = figures;
    report.add("plain HTTP from the holder GB/s", speed);
    report.add("plain HTTP from the holder CPU s/GiB", cpu);
    Ok(())
}

/// Memory of three idle nodes, and of a holder and its four pullers while each gets the layer, twice.
pub(crate) async fn memory(bed: &Bed) -> Result<Report> {
    let mut report = Report::new("memory");
    let resident = |nodes: &[Node], peak: bool| -> Result<Vec<f64>> {
        let usage = nodes.iter().map(Node::usage).collect::<Result<Vec<_>>>()?;
        let bytes = usage.iter().map(|usage| if peak { usage.peak_resident } else { usage.resident });
        Ok(bytes.map(|bytes| bytes as f64 / f64::from(1 << 20)).collect())
    };
    {
        let nodes = bed.nodes(3, Store::Holder, true).await?;
        tokio::time::sleep(SETTLE).await;
        report.add("idle MiB", resident(&nodes, false)?);
        report.add("idle peak MiB", resident(&nodes, true)?);
    }
    let nodes = bed.nodes(PULLERS + 1, Store::Holder, true).await?;
    let path = blob_path(&bed.image.repository, &bed.layer()?);
    for _ in 0..2 {
        let mut pulls = tokio::task::JoinSet::new();
        for (index, node) in nodes.iter().enumerate().skip(1) {
            let (path, namespace, address) = (path.clone(), bed.namespace(index), node.registry());
            pulls.spawn(load::with(namespace, address, move |client| whole(client, &path)));
        }
        while let Some(pull) = pulls.join_next().await {
            pull??;
        }
    }
    let peaks = resident(&nodes, true)?;
    report.add("holder serving four, peak MiB", vec![peaks[0]]);
    report.add("puller, peak MiB", peaks[1..].to_vec());
    Ok(report)
}

/// How long it takes to learn whether something is here, at a peer, or nowhere; and to get a manifest of 1 KiB.
pub(crate) async fn lookups(bed: &Bed, count: u32) -> Result<Report> {
    let mut report = Report::new("lookup");
    let nodes = bed.nodes(2, Store::Small, true).await?;
    let heads: Vec<String> = bed.small.iter().map(|(_, config)| blob_path("small", config)).collect();
    let unknown: Vec<String> =
        (0..count).map(|number| blob_path("small", &Digest::sha256(&number.to_be_bytes()))).collect();
    let sets = [(0, "local", 200, heads.clone()), (1, "remote", 200, heads), (1, "nobody", 404, unknown)];
    for (node, name, status, paths) in sets {
        let address = nodes[node].registry();
        let times = load::with(bed.namespace(node), address, move |client| {
            timed(client, "HEAD", &paths, count as usize, status)
        })
        .await?;
        percentiles(&mut report, name, times);
    }
    // Each manifest once: the second time, a node answers from memory for a few seconds.
    let paths: Vec<String> = bed.small.iter().map(|(manifest, _)| manifest_path("small", manifest)).collect();
    let plain: Vec<String> =
        bed.small.iter().map(|(manifest, _)| format!("/v2/small/manifests/{manifest}")).collect();
    let via_peer = load::with(bed.namespace(1), nodes[1].registry(), move |client| {
        timed(client, "GET", &paths, SMALL, 200)
    })
    .await?;
    let direct =
        load::with(bed.namespace(1), bed.nginx(), move |client| timed(client, "GET", &plain, SMALL, 200))
            .await?;
    percentiles(&mut report, "1 KiB manifest from a peer", via_peer);
    percentiles(&mut report, "1 KiB manifest from nginx", direct);
    Ok(report)
}

/// A pull by containerd: layers from a peer, beside the same pull over plain HTTP from nginx.
pub(crate) async fn pull(bed: &Bed, repeats: u32) -> Result<Option<Report>> {
    let Some((_, puller)) = &bed.containerds else { return Ok(None) };
    let mut report = Report::new("pull");
    let nodes = bed.nodes(2, Store::Holder, true).await?;
    let reference = bed.image.reference(super::bed::REGISTRY);
    let layer = bed.layer()?;
    let mut times = [Vec::new(), Vec::new()];
    for round in 0..=repeats {
        for (index, figure) in times.iter_mut().enumerate() {
            let mirror = nodes[1].registry_url();
            let mirrors: &[&str] = if index == 0 { &[] } else { &[&mirror] };
            puller.set_hosts(super::bed::REGISTRY, &bed.nginx_url(), mirrors)?;
            let before = nodes[0].metric("peili_transfer_upload_bytes_total", "").await?;
            let pulled = puller.cri().pull(&reference, PATIENCE).await?;
            let sent = nodes[0].metric("peili_transfer_upload_bytes_total", "").await? - before;
            let expected = bed.image.layer_bytes() as f64;
            ensure!(
                (sent >= expected) == (index == 1),
                "the layer did not come the way it should: the peer sent {sent} of {expected} bytes"
            );
            if round > 0 {
                figure.push(pulled.elapsed.as_secs_f64());
            }
            puller.cri().remove(&reference).await?;
            wait::until("containerd's garbage collection", PATIENCE, async || {
                (!puller.has_blob(&layer)).then_some(())
            })
            .await?;
        }
    }
    let ratios = times[1].iter().zip(&times[0]).map(|(peili, nginx)| peili / nginx).collect();
    let [nginx, peili] = times;
    report.add("nginx s", nginx);
    report.add("peili s", peili);
    report.add("peili/nginx", ratios);
    Ok(Some(report))
}

/// Reads the whole of `path`: its bytes, and the seconds that took.
pub(crate) fn whole(client: &mut Client, path: &str) -> Result<(f64, f64)> {
    let answer = client.request("GET", path)?;
    ensure!(answer.status == 200, "{path}: status {}", answer.status);
    Ok((answer.bytes as f64, answer.elapsed.as_secs_f64()))
}

/// Milliseconds of `count` requests, after some that do not count.
pub(crate) fn timed(
    client: &mut Client,
    method: &str,
    paths: &[String],
    count: usize,
    status: u16,
) -> Result<Vec<f64>> {
    let began = Instant::now();
    let mut times = Vec::with_capacity(count);
    for path in paths.iter().cycle().take(count) {
        let answer = client.request(method, path)?;
        ensure!(answer.status == status, "{path}: status {}", answer.status);
        times.push(answer.elapsed.as_secs_f64() * 1e3);
        ensure!(began.elapsed() < PATIENCE, "the lookups take too long");
    }
    Ok(times)
}

/// The median and the 99th percentile, with the extremes beside them.
fn percentiles(report: &mut Report, name: &str, mut times: Vec<f64>) {
    times.sort_by(f64::total_cmp);
    let p99 = times.get(times.len() * 99 / 100).copied().unwrap_or(f64::NAN);
    report.add(format!("{name} p99 ms"), vec![p99]);
    report.add(format!("{name} ms"), times);
}

fn cpu_of(node: &Node) -> Result<f64> {
    Ok(node.usage().context("a node ended")?.cpu.as_secs_f64())
}
