//! Layers: over each other to any depth, each over the one it was made from, and
//! the files that older versions made.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "common/mod.rs"]
mod common;
#[path = "common/image_file.rs"]
mod image_file;
#[path = "common/memory.rs"]
mod memory;

use std::fs::File;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{PAGE, fetch, pages, span};
use memory::{Page, any_memory, any_page, mixed, write_sparse};
use proptest::prelude::*;
use tempfile::TempDir;
use vmpager_core::ByteRange;
use vmpager_core::PageSource;
use vmpager_store::image::{
    Codec, Image, ImageError, MemoryInput, PackOptions, PackReport, Progress,
};

fn go_on(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn options(codec: Codec) -> PackOptions {
    PackOptions::default().codec(codec).frame_bytes(16384).threads(2)
}

struct Dir(TempDir);

impl Dir {
    fn new() -> Self {
        Self(TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn raw(&self, of: &[Page]) -> MemoryInput {
        let path = self.path("raw");
        write_sparse(&File::create(&path).unwrap(), &memory::memory(of));
        MemoryInput::raw(path).unwrap()
    }

    fn pack(&self, name: &str, of: &[Page]) {
        options(Codec::Lz4).pack(&self.raw(of), &self.path(name), &mut go_on).unwrap();
    }

    /// A layer over `base`.
    fn diff(&self, base: &str, name: &str, of: &[Page]) -> PackReport {
        let base = Image::open(self.path(base)).unwrap();
        options(Codec::Zstd).diff(&base, &self.raw(of), &self.path(name), &mut go_on).unwrap()
    }

    fn open(&self, name: &str) -> Result<Arc<Image>, ImageError> {
        Image::open(self.path(name))
    }
}

fn read_all(image: &Image) -> Vec<u8> {
    let len = image.memory_bytes();
    let mut bytes = vec![0xaa; usize::try_from(len).unwrap()];
    image.read(ByteRange::new(0, len), &mut bytes).unwrap();
    bytes
}

#[test]
fn a_layer_stores_only_what_is_new() {
    let dir = Dir::new();
    let base = mixed();
    dir.pack("base", &base);
    let mut new = base.clone();
    new[7] = Page::Noise(200);
    new[8] = Page::Noise(200);
    let data = (20..).find(|n| new[*n] != Page::Zero).unwrap();
    new[data] = Page::Zero;
    let report = dir.diff("base", "layer", &new);
    assert_eq!((report.stored_pages, report.duplicate_pages), (1, 1));
    let zero = new.iter().filter(|page| **page == Page::Zero).count() as u64;
    assert_eq!(report.zero_pages, zero);
    assert_eq!(report.parent_pages, 600 - zero - 2);
    assert!(report.image_bytes < 20_000, "{}", report.image_bytes);
    let image = dir.open("layer").unwrap();
    assert!(read_all(&image) == memory::memory(&new));
    assert!(image.verify(2, &mut go_on).unwrap().damage.is_empty());
    let same = dir.diff("base", "same", &base);
    assert_eq!((same.stored_pages, same.content), (0, dir.open("base").unwrap().content()));
    // Named, though it is called as its parent is.
    dir.diff("same", "over-same", &new);
    assert!(read_all(&dir.open("over-same").unwrap()) == memory::memory(&new));
}

/// The last page stored below and the first one above are neighbours in memory
/// and in number.
#[test]
fn a_run_that_goes_on_in_the_next_layer_is_read_from_both() {
    let dir = Dir::new();
    let mut of: Vec<_> = (0..6).map(Page::Text).collect();
    of.push(Page::Zero);
    dir.pack("base", &of);
    of[6] = Page::Noise(1);
    dir.diff("base", "layer", &of);
    assert!(read_all(&dir.open("layer").unwrap()) == memory::memory(&of));
}

#[test]
fn a_layer_is_over_the_image_it_was_made_from_and_no_other() {
    let dir = Dir::new();
    let mut of = mixed();
    dir.pack("base", &of);
    of[3] = Page::Text(99);
    dir.diff("base", "layer", &of);
    of[4] = Page::Text(98);
    dir.pack("other", &of);

    std::fs::rename(dir.path("base"), dir.path("elsewhere")).unwrap();
    let gone = dir.open("layer").unwrap_err();
    assert!(matches!(&gone, ImageError::NoParent { name, .. } if name == "base"), "{gone}");
    let named = |name| Image::options().parent(dir.path(name)).open(dir.path("layer"));
    assert!(named("elsewhere").is_ok());
    let wrong = named("other").unwrap_err();
    assert!(matches!(wrong, ImageError::WrongParent { .. }), "{wrong}");
    assert!(wrong.to_string().contains("other"), "{wrong}");
    std::fs::copy(dir.path("other"), dir.path("base")).unwrap();
    assert!(matches!(dir.open("layer"), Err(ImageError::WrongParent { .. })));
    // Repacked, it is the same image.
    std::fs::remove_file(dir.path("base")).unwrap();
    let contents = MemoryInput::image(Image::open(dir.path("elsewhere")).unwrap());
    options(Codec::None).frame_bytes(4096).pack(&contents, &dir.path("base"), &mut go_on).unwrap();
    assert!(dir.open("layer").is_ok());

    let smaller = dir.raw(&of[..10]);
    let base = dir.open("base").unwrap();
    let sizes = options(Codec::Lz4).diff(&base, &smaller, &dir.path("new"), &mut go_on);
    assert!(matches!(sizes, Err(ImageError::Sizes { .. })));
}

#[test]
fn layers_that_form_a_circle_are_refused() {
    let dir = Dir::new();
    let of = mixed();
    dir.pack("base", &of);
    // Layers that change nothing are called as what is below, so that each can
    // be below the other.
    dir.diff("base", "one", &of);
    dir.diff("one", "two", &of);
    let file = std::fs::read(dir.path("one")).unwrap();
    let content = dir.open("base").unwrap().content();
    let parent = [&content.as_bytes()[..], b"two"].concat();
    std::fs::write(dir.path("one"), image_file::replace(&file, b"PRNT", &parent)).unwrap();
    for name in ["one", "two"] {
        let error = dir.open(name).unwrap_err();
        assert!(matches!(error, ImageError::Circle { .. }), "{error}");
    }
    let parent = [&content.as_bytes()[..], b"one"].concat();
    std::fs::write(dir.path("one"), image_file::replace(&file, b"PRNT", &parent)).unwrap();
    assert!(matches!(dir.open("one"), Err(ImageError::Circle { .. })), "its own parent");
}

#[test]
fn layers_that_cannot_be_had_are_told_apart() {
    let dir = Dir::new();
    let mut of = mixed();
    dir.pack("base", &of);
    of[3] = Page::Text(99);
    dir.diff("base", "layer", &of);
    // Damage below is damage: found, told by the file it is in, never served.
    let mut base = std::fs::read(dir.path("base")).unwrap();
    let at = image_file::frame(&base, 0).start;
    base[at] ^= 1;
    std::fs::write(dir.path("base"), base).unwrap();
    let image = dir.open("layer").unwrap();
    let damage = image.verify(1, &mut go_on).unwrap().damage;
    assert_eq!(damage.len(), 1);
    assert_eq!(damage[0].path, dir.path("base"));
    let contents = memory::memory(&of);
    let mut reader = Arc::clone(&image).open_reader().unwrap();
    for n in 0..20 {
        match fetch(&mut *reader, pages(n, 1)) {
            Ok(bytes) => assert!(bytes == contents[span(pages(n, 1))], "page {n}"),
            Err(error) => {
                assert!(error.to_string().contains("base"), "{error}");
                assert!(damage[0].memory.iter().any(|r| r.contains(&(n * PAGE))), "page {n}");
            }
        }
    }
}

/// Files under test as they are: what was made once can be read for ever.
mod golden {
    use super::*;

    fn path(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
    }

    fn contents() -> Vec<Page> {
        let mut pages = vec![Page::Zero; 2000];
        for n in 0..10 {
            pages[100 + usize::from(n)] = Page::Text(n);
        }
        pages[1000] = Page::Noise(1);
        pages[1999] = Page::Text(5);
        pages
    }

    fn changed() -> Vec<Page> {
        let mut pages = contents();
        pages[101] = Page::Zero;
        pages[500] = Page::Text(77);
        pages
    }

    /// The image as this version makes it.
    fn make(dir: &Dir, name: &str, codec: Codec) -> Vec<u8> {
        options(codec).pack(&dir.raw(&contents()), &dir.path(name), &mut go_on).unwrap();
        std::fs::read(dir.path(name)).unwrap()
    }

    fn make_layer(dir: &Dir) -> Vec<u8> {
        let base = dir.open("none.vmimg").unwrap();
        let to = dir.path("layer.vmimg");
        options(Codec::None).diff(&base, &dir.raw(&changed()), &to, &mut go_on).unwrap();
        std::fs::read(to).unwrap()
    }

    /// With this variable set the files are made anew, for a new version.
    fn check(name: &str, made: &[u8], same_bytes: bool) {
        if std::env::var_os("VMPAGER_BLESS").is_some() {
            std::fs::write(path(name), made).unwrap();
        }
        let golden = std::fs::read(path(name)).unwrap();
        // Other versions of a compressor may make other bytes.
        assert!(!same_bytes || golden == made, "{name} is made otherwise than it was");
    }

    #[test]
    fn images_are_read_and_made_as_they_were() {
        let dir = Dir::new();
        for codec in Codec::ALL {
            let name = format!("{codec}.vmimg");
            check(&name, &make(&dir, &name, codec), codec == Codec::None);
            let image = Image::open(path(&name)).unwrap();
            assert!(read_all(&image) == memory::memory(&contents()), "{name}");
            assert!(image.verify(1, &mut go_on).unwrap().damage.is_empty());
            assert_eq!(
                image.content().to_string(),
                "43da178122145635541bd5a6eb4af47146a4531da06dcc4f66414b93c622d59f"
            );
        }
        check("layer.vmimg", &make_layer(&dir), true);
        let image = Image::open(path("layer.vmimg")).unwrap();
        assert!(read_all(&image) == memory::memory(&changed()));
        assert!(image.verify(1, &mut go_on).unwrap().damage.is_empty());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn layers_to_any_depth_are_one_memory(
        base in any_memory(20),
        changes in prop::collection::vec(
            prop::collection::vec((any::<prop::sample::Index>(), any_page()), 0..12),
            1..6,
        ),
    ) {
        let dir = Dir::new();
        dir.pack("0", &base);
        let mut of = base;
        let depth = changes.len();
        for (n, changes) in (1..).zip(changes) {
            for (at, page) in changes {
                let at = at.index(of.len());
                of[at] = page;
            }
            dir.diff(&format!("{}", n - 1), &format!("{n}"), &of);
            let image = dir.open(&format!("{n}")).unwrap();
            prop_assert!(read_all(&image) == memory::memory(&of), "layer {}", n);
        }
        let image = dir.open(&format!("{depth}")).unwrap();
        prop_assert!(image.verify(2, &mut go_on).unwrap().damage.is_empty());
        // Flattened it needs no other, and is called the same.
        let flat = dir.path("flat");
        let input = MemoryInput::image(Arc::clone(&image));
        options(Codec::Lz4).pack(&input, &flat, &mut go_on).unwrap();
        for n in 0..=depth {
            std::fs::remove_file(dir.path(&format!("{n}"))).unwrap();
        }
        let flat = Image::open(flat).unwrap();
        prop_assert_eq!(flat.content(), image.content());
        prop_assert!(read_all(&flat) == memory::memory(&of));
    }
}
