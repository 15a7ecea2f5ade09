//! One layer: a tar with one file of noise.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use peili::oci::{Algorithm, Digest, Hasher};

use super::Content;
use crate::scratch::Scratch;

/// How a layer is compressed. Its content does not compress: only the format is of interest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not.
    None,
    /// By the program `gzip`.
    Gzip,
    /// By the program `zstd`.
    Zstd,
}

/// A layer that is made.
pub(super) struct Layer {
    pub(super) digest: Digest,
    /// Of the tar.
    pub(super) diff_id: Digest,
    pub(super) size: u64,
    pub(super) content: Content,
}

/// SplitMix64 (Steele, Lea and Flood 2014): small, quick, and no gzip or zstd finds anything in it.
struct Noise(u64);

/// Hashes what passes through.
struct Hashing<W> {
    inner: W,
    hashers: Vec<Hasher>,
}

impl Noise {
    fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut value = self.0;
            value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            value ^= value >> 31;
            chunk.copy_from_slice(&value.to_le_bytes()[..chunk.len()]);
        }
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        for hasher in &mut self.hashers {
            hasher.update(&bytes[..count]);
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Makes a layer whose tar has `size` bytes (at least 2,048), in the file `path` if given, else in memory.
pub(super) fn build(
    size: u64,
    seed: u64,
    compression: Compression,
    algorithm: Algorithm,
    path: Option<PathBuf>,
) -> Result<Layer> {
    ensure!(size >= 2048, "a layer's tar has at least 2048 bytes");
    if compression != Compression::None {
        return build_compressed(size, seed, compression, algorithm, path);
    }
    let (content, diff_id, digest) = match path {
        Some(path) => {
            let file = BufWriter::with_capacity(1 << 20, File::create(&path)?);
            let (_, diff_id, digest) = write_hashed(file, size, seed, algorithm)?;
            (Content::File(path), diff_id, digest)
        }
        None => {
            let (bytes, diff_id, digest) = write_hashed(Vec::new(), size, seed, algorithm)?;
            (Content::Memory(bytes.into()), diff_id, digest)
        }
    };
    Ok(Layer { digest, diff_id, size, content })
}

fn build_compressed(
    size: u64,
    seed: u64,
    compression: Compression,
    algorithm: Algorithm,
    path: Option<PathBuf>,
) -> Result<Layer> {
    let scratch = Scratch::new()?;
    let tar = scratch.path().join("tar");
    let file = BufWriter::with_capacity(1 << 20, File::create(&tar)?);
    let (_, diff_id, _) = write_hashed(file, size, seed, algorithm)?;
    let target = path.clone().unwrap_or_else(|| scratch.path().join("compressed"));
    let (program, arguments) = match compression {
        Compression::Zstd => ("zstd", ["-q", "-1", "-c"]),
        Compression::None | Compression::Gzip => ("gzip", ["-n", "-1", "-c"]),
    };
    let status = Command::new(program)
        .args(arguments)
        .stdin(File::open(&tar)?)
        .stdout(File::create(&target)?)
        .stderr(Stdio::inherit())
        .status()
        .with_context(|| format!("cannot run {program}"))?;
    ensure!(status.success(), "{program}: {status}");
    let mut file = File::open(&target)?;
    let mut hashing = Hashing { inner: io::sink(), hashers: vec![Hasher::new(algorithm)] };
    let size = io::copy(&mut file, &mut hashing)?;
    let digest = hashing.hashers.pop().context("there is one hasher")?.finish();
    let content = match path {
        Some(path) => Content::File(path),
        None => Content::Memory(fs::read(&target)?.into()),
    };
    Ok(Layer { digest, diff_id, size, content })
}

/// Returns the writer, the sha256 digest and that of `algorithm`.
fn write_hashed<W: Write>(
    inner: W,
    size: u64,
    seed: u64,
    algorithm: Algorithm,
) -> Result<(W, Digest, Digest)> {
    let mut hashers = vec![Hasher::new(Algorithm::Sha256)];
    if algorithm != Algorithm::Sha256 {
        hashers.push(Hasher::new(algorithm));
    }
    let mut writer = Hashing { inner, hashers };
    write_tar(&mut writer, size, seed)?;
    writer.flush()?;
    let mut digests = writer.hashers.into_iter().map(Hasher::finish);
    let diff_id = digests.next().context("the first hasher is sha256")?;
    Ok((writer.inner, diff_id, digests.next().unwrap_or(diff_id)))
}

/// A tar of exactly `size` bytes: a header, the file, zeros. Readers ignore zeros after the two blocks that end a tar.
fn write_tar(writer: &mut impl Write, size: u64, seed: u64) -> Result<()> {
    const BLOCK: u64 = 512;
    let content = (size / BLOCK - 3) * BLOCK;
    let mut header = tar::Header::new_ustar();
    header.set_path(format!("lab/noise-{seed:x}"))?;
    header.set_size(content);
    header.set_mode(0o644);
    header.set_cksum();
    writer.write_all(header.as_bytes())?;
    let mut noise = Noise(seed);
    let mut buffer = vec![0; 256 << 10];
    let mut left = content;
    while left > 0 {
        let count = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
        noise.fill(&mut buffer[..count]);
        writer.write_all(&buffer[..count])?;
        left -= count as u64;
    }
    io::copy(&mut io::repeat(0).take(size - BLOCK - content), writer)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_is_a_tar_of_the_size_asked_for() {
        for size in [2048, 10_000, 1 << 20] {
            let mut bytes = Vec::new();
            write_tar(&mut bytes, size, 3).unwrap();
            assert_eq!(bytes.len() as u64, size);
            let mut archive = tar::Archive::new(&bytes[..]);
            let sizes: Vec<u64> = archive.entries().unwrap().map(|entry| entry.unwrap().size()).collect();
            assert_eq!(sizes, [(size / 512 - 3) * 512]);
        }
    }
}
