// What Xen Orchestra's VHD library makes of a chain of VHDs whose blocks have the same size.
//
//   chains_with_vhd_lib.js flatten TARGET IMAGE [PARENT ...]    writes a dynamic VHD with the content of the chain
//   chains_with_vhd_lib.js merge CHILD PARENT                   writes what CHILD has of its own into PARENT
//
// The library is found through NODE_PATH.
"use strict";

const fs = require("fs");
const { createSyntheticStream, mergeVhd } = require("vhd-lib");

// The files of this machine, as the library wants to be given files.
const files = {
  openFile: async (path, flags) => fs.openSync(path, flags),
  closeFile: async (fd) => fs.closeSync(fd),
  getSize: async (fd) => fs.fstatSync(fd).size,
  read: async (fd, buffer, position) => ({
    bytesRead: fs.readSync(fd, buffer, 0, buffer.length, position),
    buffer,
  }),
  write: async (fd, buffer, position) => {
    fs.writeSync(fd, buffer, 0, buffer.length, position);
  },
};

async function flatten(target, chain) {
  const stream = await createSyntheticStream(files, chain);
  await new Promise((resolve, reject) => {
    const out = fs.createWriteStream(target);
    stream.on("error", reject).pipe(out).on("error", reject).on("finish", resolve);
  });
}

async function main([verb, ...paths]) {
  if (verb === "flatten" && paths.length > 1) {
    await flatten(paths[0], paths.slice(1));
  } else if (verb === "merge" && paths.length === 2) {
    await mergeVhd(files, paths[1], files, paths[0]);
  } else {
    throw new Error("flatten TARGET IMAGE [PARENT ...] or merge CHILD PARENT");
  }
}

main(process.argv.slice(2)).catch((error) => {
  console.error(error);
  process.exit(1);
});
