//! The publication: writes the metadata that [`Order`] holds to the file. The module documentation of [`ordered`](super::ordered) has
//! the order of the steps, and its reason.

use std::io;
use std::sync::Arc;

use imago::StorageExt;

use super::header;
use super::metadata::{Kind, Metadata, SECTOR, SIZE, TABLE_POINTER, read, sectors};
use super::ordered::Order;

/// The number of a cluster, and its new content.
type Table = (u64, Arc<Vec<u8>>);

/// What a publication writes, as of the moment when it begins.
#[derive(Default)]
struct Plan {
    header: Option<Vec<u8>>,
    blocks: Vec<Table>,
    refcount_table: Vec<Table>,
    tables: Vec<Table>,
}

impl Order {
    /// Writes the held metadata to the file, in order. imago's caches must have been flushed, and nothing may be allocated meanwhile.
    /// Returns whether all data that was written before, with its tables, is durable already. Counts that went down need not be: if they
    /// stay too high, clusters leak.
    ///
    /// # Errors
    /// The host's. Everything stays held, so a later call may succeed.
    pub(super) fn publish(&self) -> io::Result<bool> {
        let plan = plan(&self.metadata());
        self.metadata().check_usable()?;
        let decreased = self.publish_increases(&plan)?;
        self.publish_tables(&plan)?;
        if !decreased.is_empty() {
            self.barrier()?;
        }
        let durable = self.barriers && !decreased.is_empty();
        for (cluster, block) in decreased {
            let before = self.write_table(*cluster, block)?;
            self.metadata().forget_counts(*cluster, &before, block);
        }
        let mut metadata = self.metadata();
        for (cluster, _) in plan.blocks.iter().chain(&plan.refcount_table).chain(&plan.tables) {
            metadata.held.remove(cluster);
        }
        metadata.settled = true;
        Ok(durable)
    }

    /// Steps 1 and 2. Returns the blocks in which counts still have to go down.
    fn publish_increases<'a>(&self, plan: &'a Plan) -> io::Result<Vec<&'a Table>> {
        let mut decreased = Vec::new();
        for table in &plan.blocks {
            let (cluster, block) = table;
            let offset = cluster * block.len() as u64;
            let before = read(&self.file, offset, block.len())?;
            let larger = self.metadata().larger_counts(&before, block);
            self.write_changes(offset, &before, &larger)?;
            self.metadata().forget_counts(*cluster, &before, &larger);
            if larger != **block {
                decreased.push(table);
            }
        }
        if plan.blocks.is_empty() && plan.tables.is_empty() && plan.header.is_none() {
            return Ok(decreased);
        }
        self.barrier()?;
        for (cluster, table) in &plan.refcount_table {
            self.write_table(*cluster, table)?;
        }
        if !plan.refcount_table.is_empty() {
            self.barrier()?;
        }
        let mut header = self.metadata().header_in_file.clone();
        if let Some(new) = &plan.header
            && header[TABLE_POINTER] != new[TABLE_POINTER]
        {
            header[TABLE_POINTER].copy_from_slice(&new[TABLE_POINTER]);
            self.write_header(&header)?;
            self.barrier()?;
        }
        Ok(decreased)
    }

    /// Steps 3 and 4.
    fn publish_tables(&self, plan: &Plan) -> io::Result<()> {
        for (cluster, table) in &plan.tables {
            self.write_table(*cluster, table)?;
        }
        match &plan.header {
            Some(header) if *header != self.metadata().header_in_file => {
                self.barrier()?;
                self.write_header(header)
            }
            _ => Ok(()),
        }
    }

    fn write_header(&self, header: &[u8]) -> io::Result<()> {
        self.file.write(header, 0)?;
        self.metadata().header_in_file = header.to_vec();
        Ok(())
    }

    /// Writes a table, and returns what was there before.
    fn write_table(&self, cluster: u64, table: &[u8]) -> io::Result<Vec<u8>> {
        let offset = cluster * table.len() as u64;
        let before = read(&self.file, offset, table.len())?;
        self.write_changes(offset, &before, table)?;
        Ok(before)
    }

    /// Writes the sectors of a table from the first to the last that changes.
    fn write_changes(&self, offset: u64, before: &[u8], after: &[u8]) -> io::Result<()> {
        let mut changed = sectors(before, after).enumerate().filter(|(_, (old, new))| old != new);
        let Some((first, _)) = changed.next() else { return Ok(()) };
        let last = changed.last().map_or(first, |(last, _)| last);
        let range = first * SECTOR..(last + 1) * SECTOR;
        self.file.write(&after[range.clone()], offset + range.start as u64)
    }
}

/// Takes what is held, sorted by the step that writes it.
fn plan(metadata: &Metadata) -> Plan {
    let mut plan = Plan::default();
    for (cluster, content) in &metadata.held {
        let step = match metadata.kind(*cluster) {
            Some(Kind::RefcountBlock) => &mut plan.blocks,
            Some(Kind::RefcountTable) => &mut plan.refcount_table,
            _ => &mut plan.tables,
        };
        step.push((*cluster, Arc::clone(content)));
    }
    let mut header = metadata.header.clone();
    let size = header::long(&header, SIZE.start).min(metadata.size_limit);
    header[SIZE].copy_from_slice(&size.to_be_bytes());
    plan.header = (header != metadata.header_in_file).then_some(header);
    plan
}
