//! Where the metadata of a writable qcow2 image lies, and which of its clusters are newer in memory than in the file.
//!
//! [`OrderedStorage`](super::ordered::OrderedStorage) asks three questions here. Is a host cluster metadata, and of which
//! kind? May the file, as it is on the medium, still refer to a cluster? What has to be written at the next publication?
//! The answers follow imago's own writes. A changed entry of the L1 table makes its target an L2 table, and one of the refcount table
//! makes its target a refcount block. A changed header moves these two tables.
//!
//! Invariant: no cluster has two kinds, and no cluster of metadata has a refcount of zero. When an image is opened, both are checked
//! for all tables. When an L2 table is loaded, each entry is checked ([`Metadata::check_l2`]). So even in a crafted image, a guest's
//! data is never in a cluster of metadata, and metadata is never allocated a second time.
//!
//! The fields are those of QEMU's docs/interop/qcow2.txt.

use std::collections::HashMap;
use std::collections::btree_map::{BTreeMap, Entry};
use std::io;
use std::ops::Range;
use std::sync::Arc;

use imago::StorageExt;

use super::header::{self, AUTOCLEAR, FEATURES_END, HEADER_SIZE, damaged};
use super::storage::HostStorage;

/// Where the header has the disk's size.
pub(super) const SIZE: Range<usize> = 24..32;
/// Where the header has the refcount table's offset and size. The whole header lies in one sector, so a torn write cannot change only
/// one of the two.
pub(super) const TABLE_POINTER: Range<usize> = 48..60;
pub(super) const SECTOR: usize = 512;
/// Most sectors of refcount blocks that are cached in memory: 32 MiB.
const MAX_COUNTS: usize = 64 << 10;
/// The host offset in an entry of any table.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;

/// Most clusters of metadata. The largest tables that QEMU allows have fewer.
const MAX_CLUSTERS: usize = 8 << 20;
/// Most clusters of the snapshot table and of the L1 tables that it names. A crafted file can end before them, but here they take some 40
/// MiB of memory. An image of a terabyte in clusters of 4 KiB can still have 1,000 snapshots.
const MAX_SNAPSHOT_CLUSTERS: u64 = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Header,
    L1,
    L2,
    RefcountTable,
    RefcountBlock,
    /// The snapshot table, or a snapshot's L1 table: never written here.
    Snapshot,
}

#[derive(Debug, Default)]
pub(super) struct Metadata {
    cluster_bits: u32,
    refcount_order: u32,
    /// The header as imago sees it.
    pub(super) header: Vec<u8>,
    /// The header in the file.
    pub(super) header_in_file: Vec<u8>,
    l1_offset: u64,
    l1: Vec<u64>,
    refcount_table_offset: u64,
    refcount_table: Vec<u64>,
    kinds: HashMap<u64, Kind>,
    /// Clusters whose content is newer than the file's.
    pub(super) held: BTreeMap<u64, Arc<Vec<u8>>>,
    /// Sectors of refcount blocks as they are in the file, by their sector number.
    counts: HashMap<u64, Vec<u8>>,
    /// Since the last publication, no change may have freed a cluster. So imago allocates only clusters to which the file does not refer.
    pub(super) settled: bool,
    /// A write was refused because its cluster is not free on the medium yet. It will succeed after a publication.
    pub(super) refused: bool,
    /// imago must not allocate tables: the operation under way only frees clusters.
    pub(super) no_new_tables: bool,
    /// Most bytes of disk that a publication writes to the header, whatever imago wrote there.
    pub(super) size_limit: u64,
    /// The header has feature bits (version 3).
    pub(super) has_features: bool,
    /// The header has autoclear bits set. They vouch for data that the first change makes out of date.
    pub(super) vouched: bool,
    pub(super) is_corrupt: bool,
}

impl Metadata {
    /// Reads and checks the tables of an image whose header has passed [`header::check`].
    pub(super) fn load(file: &HostStorage) -> io::Result<Self> {
        let start = read(file, 0, FEATURES_END as usize)?;
        let header = start[..HEADER_SIZE].to_vec();
        let version3 = header::word(&start, 4) >= 3;
        let mut metadata = Self {
            cluster_bits: header::word(&start, 20) as u32,
            refcount_order: if version3 { header::word(&start, 96) as u32 } else { 4 },
            header_in_file: header.clone(),
            header,
            l1_offset: u64::MAX,
            refcount_table_offset: u64::MAX,
            settled: true,
            size_limit: u64::MAX,
            has_features: version3,
            vouched: version3 && header::long(&start, AUTOCLEAR as usize) != 0,
            ..Self::default()
        };
        metadata.add(0, Kind::Header)?;
        metadata.follow_header(file)?;
        metadata.add_snapshots(file)?;
        let mut tables: Vec<_> = metadata.kinds.keys().copied().collect();
        tables.sort_unstable();
        for cluster in tables {
            if !metadata.is_counted(file, cluster)? {
                return Err(damaged(&format!("cluster {cluster} of its metadata is not counted")));
            }
        }
        Ok(metadata)
    }

    pub(super) fn cluster_size(&self) -> usize {
        1 << self.cluster_bits
    }

    pub(super) fn held_bytes(&self) -> usize {
        self.held.len() * self.cluster_size()
    }

    pub(super) fn cluster(&self, offset: u64) -> u64 {
        offset >> self.cluster_bits
    }

    /// The clusters that a range of the file touches.
    pub(super) fn clusters(&self, offset: u64, length: u64) -> Range<u64> {
        self.cluster(offset)..self.cluster(offset + length.max(1) - 1) + 1
    }

    pub(super) fn kind(&self, cluster: u64) -> Option<Kind> {
        self.kinds.get(&cluster).copied()
    }

    /// Records that a cluster is metadata now.
    fn add(&mut self, cluster: u64, kind: Kind) -> io::Result<()> {
        if self.kinds.len() > MAX_CLUSTERS {
            return Err(damaged("its metadata is larger than any image needs"));
        }
        if self.kinds.contains_key(&cluster) {
            return Err(damaged(&format!("its tables overlap at cluster {cluster}")));
        }
        self.kinds.insert(cluster, kind);
        Ok(())
    }

    fn add_range(&mut self, offset: u64, length: u64, kind: Kind) -> io::Result<()> {
        self.check_offset(offset)?;
        self.clusters(offset, length).try_for_each(|cluster| self.add(cluster, kind))
    }

    /// Records that a cluster is no longer metadata, and drops what was to be written to it.
    fn remove(&mut self, cluster: u64) {
        self.kinds.remove(&cluster);
        self.held.remove(&cluster);
        self.settled = false;
    }

    fn check_offset(&self, offset: u64) -> io::Result<()> {
        match offset.is_multiple_of(self.cluster_size() as u64) && offset < 1 << 56 {
            true => Ok(()),
            false => Err(damaged("a table is not at the start of a cluster")),
        }
    }

    /// Reads from the header where the L1 table and the refcount table are, and records their clusters.
    fn follow_header(&mut self, file: &HostStorage) -> io::Result<()> {
        let (entries, offset) = (header::word(&self.header, 36), header::long(&self.header, 40));
        if offset != self.l1_offset {
            let l1 = self.read_table(file, offset, entries)?;
            self.move_table(Kind::L1, offset, entries * 8)?;
            self.l1_offset = offset;
            self.follow_entries(Kind::L1, 0, &l1)?;
        }
        let (offset, clusters) = (header::long(&self.header, 48), header::word(&self.header, 56));
        if offset != self.refcount_table_offset {
            let length = clusters << self.cluster_bits;
            let table = self.read_table(file, offset, length / 8)?;
            self.move_table(Kind::RefcountTable, offset, length)?;
            self.refcount_table_offset = offset;
            self.follow_entries(Kind::RefcountTable, 0, &table)?;
        }
        Ok(())
    }

    fn move_table(&mut self, kind: Kind, offset: u64, length: u64) -> io::Result<()> {
        let old = self.kinds.iter().filter(|entry| *entry.1 == kind).map(|entry| *entry.0);
        old.collect::<Vec<_>>().into_iter().for_each(|cluster| self.remove(cluster));
        if length == 0 { Ok(()) } else { self.add_range(offset, length, kind) }
    }

    /// Records the L2 tables or refcount blocks to which new entries of the L1 table or the refcount table refer. The first entry is
    /// that of `index`.
    fn follow_entries(&mut self, table: Kind, index: usize, entries: &[u64]) -> io::Result<()> {
        for (index, entry) in (index..).zip(entries) {
            let (list, kind) = match table {
                Kind::L1 => (&mut self.l1, Kind::L2),
                _ => (&mut self.refcount_table, Kind::RefcountBlock),
            };
            if list.len() <= index {
                list.resize(index + 1, 0);
            }
            let (old, new) = (list[index] & OFFSET, entry & OFFSET);
            list[index] = new;
            if old == new {
                continue;
            }
            if old != 0 {
                self.remove(self.cluster(old));
            }
            if new != 0 {
                self.check_offset(new)?;
                self.add(self.cluster(new), kind)?;
            }
        }
        Ok(())
    }

    /// Holds a write to a cluster of `kind` until the next publication, and records the tables to which it refers.
    pub(super) fn take_write(
        &mut self,
        file: &HostStorage,
        kind: Kind,
        data: &[u8],
        offset: u64,
    ) -> io::Result<()> {
        let start = match kind {
            Kind::Header => {
                let length = data.len().min(HEADER_SIZE);
                self.header[..length].copy_from_slice(&data[..length]);
                return self.follow_header(file);
            }
            Kind::L2 | Kind::RefcountBlock => return self.hold(file, offset, data),
            Kind::Snapshot => return Err(damaged("a snapshot's table would be written to")),
            Kind::L1 => self.l1_offset,
            Kind::RefcountTable => self.refcount_table_offset,
        };
        self.hold(file, offset, data)?;
        self.follow_entries(kind, ((offset - start) / 8) as usize, &entries(data))
    }

    fn read_table(&self, file: &HostStorage, offset: u64, count: u64) -> io::Result<Vec<u64>> {
        self.check_offset(offset)?;
        let bytes = read(file, offset, count as usize * 8)?;
        Ok(entries(&bytes))
    }

    /// Records the clusters of the snapshot table, whose length follows only from its entries, and of the L1 tables that it names.
    fn add_snapshots(&mut self, file: &HostStorage) -> io::Result<()> {
        let (count, start) = (header::word(&self.header, 60), header::long(&self.header, 64));
        if count > 65536 {
            return Err(damaged("it has more than 65536 snapshots"));
        }
        let (mut at, mut clusters) = (start, 0);
        for _ in 0..count {
            let entry = read(file, at, 40)?;
            let (l1, entries) = (header::long(&entry, 0), header::word(&entry, 8));
            if entries > header::L1_MAX {
                return Err(damaged("the L1 table of a snapshot is larger than 32 MiB"));
            }
            let names = header::word(&entry, 12) >> 16;
            let names = names + (header::word(&entry, 12) & 0xffff);
            let length = 40 + header::word(&entry, 36) + names;
            clusters += (entries * 8 + length).div_ceil(self.cluster_size() as u64);
            if clusters > MAX_SNAPSHOT_CLUSTERS {
                return Err(damaged(&format!(
                    "its snapshots have tables of more than {MAX_SNAPSHOT_CLUSTERS} clusters"
                )));
            }
            if entries > 0 {
                self.add_range(l1, entries * 8, Kind::Snapshot)?;
            }
            at = (at + length).next_multiple_of(8);
        }
        if count > 0 { self.add_range(start, at - start, Kind::Snapshot) } else { Ok(()) }
    }

    /// Whether the refcount of `cluster` in the file is above zero. If it is, the file may refer to the cluster.
    pub(super) fn is_counted(&mut self, file: &HostStorage, cluster: u64) -> io::Result<bool> {
        let in_block = 1_u64 << (self.cluster_bits + 3 - self.refcount_order);
        let block = self.refcount_table.get((cluster / in_block) as usize).filter(|at| **at != 0);
        let Some(&block) = block else { return Ok(false) };
        let bit = (cluster % in_block) << self.refcount_order;
        let sector = block / SECTOR as u64 + bit / 8 / SECTOR as u64;
        if !self.counts.contains_key(&sector) {
            if self.counts.len() >= MAX_COUNTS {
                self.counts.clear();
            }
            self.counts.insert(sector, read(file, sector * SECTOR as u64, SECTOR)?);
        }
        let at = (bit / 8) as usize % SECTOR;
        let count = &self.counts[&sector][at..at + 1.max(1 << self.refcount_order >> 3)];
        Ok(match self.refcount_order {
            order @ 0..3 => count[0] >> (bit % 8) & ((1 << (1 << order)) - 1) != 0,
            _ => count.iter().any(|byte| *byte != 0),
        })
    }

    /// Drops cached sectors of the refcount block in `cluster`, which was changed in the file from `before` to `after`.
    pub(super) fn forget_counts(&mut self, cluster: u64, before: &[u8], after: &[u8]) {
        let first = (cluster << self.cluster_bits) / SECTOR as u64;
        for (sector, (before, after)) in (first..).zip(sectors(before, after)) {
            if before != after {
                self.counts.remove(&sector);
            }
        }
    }

    /// Refuses changes of an image that was found to be corrupt.
    pub(super) fn check_usable(&self) -> io::Result<()> {
        if self.is_corrupt { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
    }

    /// A refcount block that has, for each cluster, the larger of the counts in two blocks.
    pub(super) fn larger_counts(&self, one: &[u8], other: &[u8]) -> Vec<u8> {
        let mut larger = one.to_vec();
        for ((one, other), larger) in sectors(one, other).zip(larger.chunks_mut(SECTOR)) {
            match self.refcount_order {
                _ if one == other => {}
                order @ 0..3 => {
                    let mask = (1_u8 << (1 << order)) - 1;
                    for ((larger, one), other) in larger.iter_mut().zip(one).zip(other) {
                        *larger = (0..8).step_by(1 << order).fold(0, |byte, bit| {
                            let field = mask << bit;
                            byte | (one & field).max(other & field)
                        });
                    }
                }
                // Counts are big-endian, so comparing their bytes compares the numbers.
                order => {
                    let size = 1 << (order - 3);
                    let pairs = one.chunks(size).zip(other.chunks(size));
                    for (larger, (one, other)) in larger.chunks_mut(size).zip(pairs) {
                        larger.copy_from_slice(one.max(other));
                    }
                }
            }
        }
        larger
    }

    /// Refuses an L2 table of the file that refers to metadata, which a guest could then write, or to clusters without a count, which
    /// would be allocated a second time.
    pub(super) fn check_l2(&mut self, file: &HostStorage, table: &[u8]) -> io::Result<()> {
        for entry in entries(table) {
            let clusters = match entry {
                _ if entry & COMPRESSED != 0 => {
                    let size_shift = 62 - (self.cluster_bits - 8);
                    let offset = entry & ((1 << size_shift) - 1);
                    let sectors = (entry & (COMPRESSED - 1)) >> size_shift;
                    self.clusters(offset, (sectors + 1) * 512 - offset % 512)
                }
                _ if entry & OFFSET == 0 => continue,
                _ => self.clusters(entry & OFFSET, 1),
            };
            for cluster in clusters {
                if self.kinds.contains_key(&cluster) || !self.is_counted(file, cluster)? {
                    return Err(damaged(&format!("an L2 table refers to cluster {cluster}")));
                }
            }
        }
        Ok(())
    }

    /// Writes `data` to the clusters in memory that wait for publication.
    fn hold(&mut self, file: &HostStorage, mut offset: u64, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let (cluster, size) = (self.cluster(offset), self.cluster_size());
            let at = (offset % size as u64) as usize;
            let (piece, rest) = data.split_at(data.len().min(size - at));
            let content = match self.held.entry(cluster) {
                Entry::Occupied(entry) => entry.into_mut(),
                Entry::Vacant(entry) if piece.len() == size => entry.insert(vec![0; size].into()),
                Entry::Vacant(entry) => {
                    entry.insert(read(file, cluster << self.cluster_bits, size)?.into())
                }
            };
            Arc::make_mut(content)[at..at + piece.len()].copy_from_slice(piece);
            offset += piece.len() as u64;
            data = rest;
        }
        Ok(())
    }
}

/// The sectors of two tables, side by side.
pub(super) fn sectors<'a>(
    one: &'a [u8],
    other: &'a [u8],
) -> impl Iterator<Item = (&'a [u8], &'a [u8])> {
    one.chunks(SECTOR).zip(other.chunks(SECTOR))
}

fn entries(table: &[u8]) -> Vec<u64> {
    table.as_chunks().0.iter().map(|entry| u64::from_be_bytes(*entry)).collect()
}

/// Reads from the file. Bytes past its end are zero.
pub(super) fn read(file: &HostStorage, offset: u64, length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    file.read(&mut bytes[..], offset)?;
    Ok(bytes)
}
